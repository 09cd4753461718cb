"""A certificate proves one peer id; anything that proves none, or another, is refused with the reason."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import example, given
from hypothesis import strategies as st

from common.errors import IdentityError
from protocol.certificate import EXTENSION, MAX_CERTIFICATE_BYTES, certificate_of, host_name, pem_of, proven_peer_id
from protocol.identity import Identity

NOW_S = 1_800_000_000.0
PEER, OTHER = Identity.generate(), Identity.generate()
GENUINE = x509.load_pem_x509_certificate(certificate_of(PEER, NOW_S).chain)
DER = GENUINE.public_bytes(serialization.Encoding.DER)
VERSION_AT = DER.index(b"\xa0\x03\x02\x01") + 4
"""Of the certificate's version: an unknown one is an error of its own kind in cryptography."""


def self_signed(proof: bytes | None, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    """A certificate with any proof in it, or none."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]), datetime.fromtimestamp(NOW_S, UTC)
    builder = (
        x509.CertificateBuilder()
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
    )
    if proof is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(EXTENSION, proof), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def proof_in(der: bytes) -> bytes:
    extension = x509.load_der_x509_certificate(der).extensions.get_extension_for_oid(EXTENSION).value
    assert isinstance(extension, x509.UnrecognizedExtension)
    return extension.value


def test_a_certificate_proves_its_peer_and_no_other() -> None:
    assert proven_peer_id(DER, NOW_S) == PEER.peer_id
    assert x509.load_pem_x509_certificate(pem_of(DER)) == GENUINE
    names = GENUINE.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [host_name(PEER.peer_id)]


def test_each_start_has_a_key_of_its_own_and_it_is_not_shown() -> None:
    one, other = certificate_of(PEER, NOW_S), certificate_of(PEER, NOW_S)
    assert one.key != other.key
    assert b"PRIVATE" in one.key
    assert "PRIVATE" not in repr(one)


def test_a_proof_taken_from_another_certificate_is_refused() -> None:
    with pytest.raises(IdentityError, match="has not signed its key"):
        proven_peer_id(self_signed(proof_in(DER)), NOW_S)


def test_a_strangers_certificate_names_no_peer() -> None:
    with pytest.raises(IdentityError, match="names no peer"):
        proven_peer_id(self_signed(None), NOW_S)


def test_a_proof_for_another_purpose_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    proof = proof_in(DER)[:-64] + PEER.sign(b"record/1", spki)
    with pytest.raises(IdentityError, match="has not signed its key"):
        proven_peer_id(self_signed(proof, key), NOW_S)


@pytest.mark.parametrize("days", [-1, 3651])
def test_an_old_or_future_certificate_is_refused(days: int) -> None:
    with pytest.raises(IdentityError, match="clocks"):
        proven_peer_id(DER, NOW_S + days * 86_400)


@given(st.binary(max_size=200))
def test_any_other_proof_is_refused(proof: bytes) -> None:
    with pytest.raises(IdentityError):
        proven_peer_id(self_signed(proof), NOW_S)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # it means nothing to us
@given(st.integers(0, len(DER) - 1), st.integers(1, 255))
@example(VERSION_AT, 1)
def test_no_changed_byte_proves_another_peer(place: int, change: int) -> None:
    changed = bytearray(DER)
    changed[place] ^= change
    try:
        found = proven_peer_id(bytes(changed), NOW_S)
    except IdentityError:
        return
    assert found == PEER.peer_id  # the proof of the key is whole, whatever else it says


@given(st.binary(max_size=300))
def test_bytes_that_are_no_certificate_are_refused(raw: bytes) -> None:
    with pytest.raises(IdentityError):
        proven_peer_id(raw, NOW_S)


def test_a_huge_certificate_is_not_read() -> None:
    with pytest.raises(IdentityError, match="but the limit is"):
        proven_peer_id(b"\x30" * (MAX_CERTIFICATE_BYTES + 1), NOW_S)

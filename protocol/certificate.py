"""TLS certificates that prove a peer id: libp2p's TLS specification, so that any libp2p program reads them.

A certificate is self-signed by a P-256 key that lives as long as the process. An extension holds the node's Ed25519 key
and its signature over the P-256 key; the host name in it is the peer id, in lower case.
https://github.com/libp2p/specs/blob/master/tls/tls.md
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, ObjectIdentifier

from common.errors import IdentityError
from protocol.identity import check_certified, peer_id_of, public_key_of

if TYPE_CHECKING:
    from protocol.identity import Identity

MAX_CERTIFICATE_BYTES = 4096
EXTENSION = ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
VALID_BEFORE = timedelta(hours=1)
"""Clocks differ."""
VALID_FOR = timedelta(days=3650)
"""The key ends with the process, whatever the certificate says."""

# DER of SEQUENCE { OCTET STRING publicKey, OCTET STRING signature }: with Ed25519 all lengths are fixed.
_SEQUENCE = bytes([0x30, 2 + 36 + 2 + 64])
_KEY = bytes([0x04, 36, 0x08, 0x01, 0x12, 32])
_SIGNATURE = bytes([0x04, 64])
_KEY_AT = len(_SEQUENCE) + len(_KEY)
_SIGNATURE_AT = _KEY_AT + 32 + len(_SIGNATURE)
_LENGTH = _SIGNATURE_AT + 64


@dataclass(frozen=True)
class Certificate:
    """A certificate in PEM with its private key, which `repr` does not show."""

    chain: bytes
    key: bytes

    def __repr__(self) -> str:
        return f"Certificate({len(self.chain)} bytes)"


def certificate_of(identity: Identity, now_s: float) -> Certificate:
    """A fresh certificate for `identity`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.peer_id)]), _utc(now_s)
    certificate = (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - VALID_BEFORE)
        .not_valid_after(now + VALID_FOR)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host_name(identity.peer_id))]), critical=False)
        .add_extension(x509.UnrecognizedExtension(EXTENSION, _proof(identity, key.public_key())), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Certificate(certificate.public_bytes(serialization.Encoding.PEM), private)


UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What cryptography raises for bytes that are no certificate, or one that it cannot check."""


def proven_peer_id(der: bytes, now_s: float) -> str:
    """The peer id that a certificate proves; raises IdentityError if it proves none."""
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise IdentityError(f"certificate: is {len(der)} bytes, but the limit is {MAX_CERTIFICATE_BYTES}")
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.verify_directly_issued_by(certificate)
        proof = certificate.extensions.get_extension_for_oid(EXTENSION).value
        spki = _spki(certificate.public_key())
    except x509.ExtensionNotFound:
        raise IdentityError("certificate: names no peer; it is not a kilohive node's") from None
    except UNREADABLE as error:
        raise IdentityError(f"certificate: cannot be read ({type(error).__name__})") from None
    now = _utc(now_s)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise IdentityError("certificate: not valid now; check that both machines' clocks are right")
    return _checked(proof, spki)


def pem_of(der: bytes) -> bytes:
    """Convert a certificate that `proven_peer_id` has read from DER to PEM."""
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def host_name(peer_id: str) -> str:
    """What stands for the peer id where TLS wants a host name; those know no upper case."""
    return peer_id.lower()


def _checked(proof: object, spki: bytes) -> str:
    raw = proof.value if isinstance(proof, x509.UnrecognizedExtension) else b""
    public_key, signature = raw[_KEY_AT : _KEY_AT + 32], raw[_SIGNATURE_AT:]
    if len(raw) != _LENGTH or raw != _SEQUENCE + _KEY + public_key + _SIGNATURE + signature:
        raise IdentityError("certificate: its proof is not that of an Ed25519 peer")
    check_certified(public_key, spki, signature)
    return peer_id_of(public_key)


def _proof(identity: Identity, key: ec.EllipticCurvePublicKey) -> bytes:
    public_key = public_key_of(identity.peer_id)
    return _SEQUENCE + _KEY + public_key + _SIGNATURE + identity.certify(_spki(key))


def _spki(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError("not an elliptic curve")
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)

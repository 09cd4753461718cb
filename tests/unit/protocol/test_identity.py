"""Who a node is: keys, their files, peer ids and signatures."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest
from hivemind.p2p import PeerID
from hypothesis import given
from hypothesis import strategies as st

from common.errors import IdentityError
from protocol.identity import KEY_BYTES, PEER_ID_CHARS, Identity, peer_id_of, public_key_of, verify

if TYPE_CHECKING:
    from pathlib import Path

# libp2p/specs, peer-ids/peer-ids.md, "Ed25519": protobuf-encoded keys
SPEC_PRIVATE_KEY = (
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
SPEC_PUBLIC_KEY = "080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"


def test_the_example_of_the_libp2p_specification_is_read() -> None:
    identity = Identity(bytes.fromhex(SPEC_PRIVATE_KEY))
    assert identity.public_key.hex() == SPEC_PUBLIC_KEY[8:]
    assert identity.peer_id == PeerID(b"\x00\x24" + bytes.fromhex(SPEC_PUBLIC_KEY)).to_base58()


def test_a_new_key_has_the_form_of_the_example() -> None:
    identity = Identity.generate()
    assert identity.private_key_protobuf[:4].hex() == SPEC_PRIVATE_KEY[:8]
    assert len(identity.private_key_protobuf) == len(SPEC_PRIVATE_KEY) // 2
    assert identity.peer_id.startswith("12D3KooW")


def test_a_peer_id_gives_back_its_public_key() -> None:
    identity = Identity.generate()
    assert public_key_of(identity.peer_id) == identity.public_key
    assert peer_id_of(identity.public_key) == identity.peer_id


@given(st.text(max_size=2 * PEER_ID_CHARS))
def test_no_other_text_is_a_peer_id(text: str) -> None:
    with pytest.raises(IdentityError, match="not an Ed25519 peer id"):
        public_key_of(text)


@pytest.mark.parametrize(
    "change",
    [str.lower, lambda text: f" {text[:-1]}", lambda text: text[:-1], lambda text: f"1{text[:-1]}"],
    ids=["lower case", "blank", "short", "one more leading 1"],
)
def test_a_changed_peer_id_is_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(IdentityError):
        public_key_of(change(Identity.generate().peer_id))


def test_an_rsa_peer_id_is_refused() -> None:
    with pytest.raises(IdentityError, match="not an Ed25519 peer id"):
        public_key_of("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")


def test_the_first_start_makes_a_key_that_only_its_owner_can_read(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "host.key"
    identity = Identity.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["host.key"]
    assert Identity.load_or_create(path).peer_id == identity.peer_id


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    path, found = tmp_path / "host.key", []
    start = threading.Barrier(8)

    def load() -> None:
        start.wait()
        found.append(Identity.load_or_create(path).peer_id)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_key_is_made_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_source: object, _target: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    made = Identity.load_or_create(tmp_path / "host.key")
    assert Identity.load_or_create(tmp_path / "host.key").peer_id == made.peer_id
    assert [path.name for path in tmp_path.iterdir()] == ["host.key"]


def test_a_key_on_a_file_system_without_permissions_is_refused_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "host.key"
    Identity.load_or_create(path)
    path.chmod(0o755)
    monkeypatch.setattr("common.secret_file.keeps_permissions", lambda _folder: False)
    with pytest.raises(IdentityError, match=r"host\.key: its file system keeps no permissions, .* choose a folder"):
        Identity.load_or_create(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_key_that_others_can_touch_is_refused_with_the_command_that_helps(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "host.key"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        Identity.load_or_create(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: b"",
        lambda blob: blob[:-1],
        lambda blob: blob + b"x",
        lambda blob: blob[:10] + bytes([blob[10] ^ 1]) + blob[11:],
        lambda blob: b"\x08\x00" + blob[2:],
    ],
    ids=["empty", "short", "long", "flipped bit", "other key type"],
)
def test_a_damaged_key_file_is_one_clear_sentence(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    path = tmp_path / "host.key"
    path.write_bytes(damage(Identity.generate().private_key_protobuf))
    path.chmod(0o600)
    with pytest.raises(IdentityError, match=r"^identity: "):
        Identity.load_or_create(path)


def test_a_folder_in_the_place_of_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=str(tmp_path)):
        Identity.load_or_create(tmp_path)


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IdentityError, match=r"file/host\.key"):
        Identity.load_or_create(tmp_path / "file" / "host.key")


def test_a_key_is_not_shown_by_repr() -> None:
    identity = Identity.generate()
    assert repr(identity) == f"Identity({identity.peer_id})"


def test_a_signature_holds_for_its_key_domain_and_message() -> None:
    identity = Identity.generate()
    verify(identity.public_key, b"record", b"hello", identity.sign(b"record", b"hello"))


def test_a_signature_holds_for_nothing_else() -> None:
    identity, other = Identity.generate(), Identity.generate()
    signature = identity.sign(b"record", b"hello")
    for public_key, domain, message in [
        (other.public_key, b"record", b"hello"),
        (identity.public_key, b"call", b"hello"),
        (identity.public_key, b"record", b"hello "),
        (identity.public_key, b"recordh", b"ello"),
    ]:
        with pytest.raises(IdentityError, match="signature"):
            verify(public_key, domain, message, signature)


@given(position=st.integers(0, 63), bit=st.integers(0, 7))
def test_no_bit_of_a_signature_can_change(position: int, bit: int) -> None:
    identity = Identity.generate()
    signature = bytearray(identity.sign(b"record", b"hello"))
    signature[position] ^= 1 << bit
    with pytest.raises(IdentityError, match="signature"):
        verify(identity.public_key, b"record", b"hello", bytes(signature))


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_random_bytes_are_no_key_and_no_signature(public_key: bytes, signature: bytes) -> None:
    with pytest.raises(IdentityError):
        verify(public_key, b"record", b"hello", signature)


def test_a_key_of_the_wrong_length_has_no_peer_id() -> None:
    with pytest.raises(IdentityError, match="must be 32 bytes, is 31"):
        peer_id_of(os.urandom(KEY_BYTES - 1))


@pytest.mark.parametrize("domain", [b"", b"x" * 256])
def test_a_signature_needs_a_domain(domain: bytes) -> None:
    with pytest.raises(IdentityError, match="domain"):
        Identity.generate().sign(domain, b"hello")

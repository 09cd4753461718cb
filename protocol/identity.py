"""Who a node is: one Ed25519 key, the libp2p peer id made from it, and what it signs.

Everything that a peer claims (its DHT records, its calls, its server's certificate) is checked against this key, so a
peer id is all that one node must know of another. The file format is libp2p's, which p2pd reads as it is.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import IdentityError
from common.secret_file import read_private

KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_DOMAIN_BYTES = 255
PEER_ID_CHARS = 52
"""Length of every Ed25519 peer id in base58."""

# libp2p's protobuf PrivateKey {Type = Ed25519, Data = seed || public key}, and the multihash of its PublicKey.
_PRIVATE_HEADER = bytes([0x08, 0x01, 0x12, 2 * KEY_BYTES])
_PRIVATE_BYTES = len(_PRIVATE_HEADER) + 2 * KEY_BYTES
_PEER_ID_HEADER = bytes([0x00, 0x24, 0x08, 0x01, 0x12, KEY_BYTES])
_SIGNED_PREFIX = b"kilohive\x00"
_TLS_PREFIX = b"libp2p-tls-handshake:"


class Identity:
    """A private key and what follows from it. Never printed: `repr` shows the peer id only."""

    def __init__(self, private_key_protobuf: bytes) -> None:
        """Read a libp2p PrivateKey; raises IdentityError for anything but a whole Ed25519 key."""
        self._key = _parse_private_key(private_key_protobuf)
        self.private_key_protobuf = private_key_protobuf
        self.public_key = self._key.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @classmethod
    def generate(cls) -> Identity:
        """Make a new identity in memory."""
        key = Ed25519PrivateKey.generate()
        return cls(_PRIVATE_HEADER + key.private_bytes_raw() + key.public_key().public_bytes_raw())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Read the key at `path`; the first time, make one there with mode 0600.

        Raises:
            IdentityError: the file is damaged, unreadable, or open to other users.
        """
        try:
            if not path.exists():
                _write_new(path, cls.generate().private_key_protobuf)
            return cls(read_private(path, _PRIVATE_BYTES + 1))
        except OSError as error:
            raise IdentityError(f"identity file {path}: {error.strerror or error}") from error

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """Sign `message` for one purpose: the signature holds in `domain` only."""
        return self._key.sign(_in_domain(domain, message))

    def certify(self, tls_key: bytes) -> bytes:
        """Sign a TLS key (DER) as libp2p's TLS specification asks; the signature holds for nothing else."""
        return self._key.sign(_TLS_PREFIX + tls_key)


def verify(public_key: bytes, domain: bytes, message: bytes, signature: bytes) -> None:
    """Raise IdentityError unless `public_key` made `signature` over `message` in `domain`."""
    if len(public_key) != KEY_BYTES:
        raise IdentityError(f"public_key: must be {KEY_BYTES} bytes, is {len(public_key)}")
    if len(signature) != SIGNATURE_BYTES:
        raise IdentityError(f"signature: must be {SIGNATURE_BYTES} bytes, is {len(signature)}")
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _in_domain(domain, message))
    except (InvalidSignature, ValueError):
        raise IdentityError("signature: does not match the public key and the signed fields") from None


def check_certified(public_key: bytes, tls_key: bytes, signature: bytes) -> None:
    """Raise IdentityError unless `public_key` made `signature` with `Identity.certify`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _TLS_PREFIX + tls_key)
    except (InvalidSignature, ValueError):
        raise IdentityError("certificate: the peer it names has not signed its key") from None


def peer_id_of(public_key: bytes) -> str:
    """Peer id of a raw Ed25519 key: base58 of the identity multihash of its protobuf (libp2p peer-id spec)."""
    if len(public_key) != KEY_BYTES:
        raise IdentityError(f"public_key: must be {KEY_BYTES} bytes, is {len(public_key)}")
    return base58.b58encode(_PEER_ID_HEADER + public_key).decode("ascii")


def public_key_of(peer_id: str) -> bytes:
    """Raw key inside an Ed25519 peer id; raises IdentityError for any other text."""
    problem = f"peer id: {peer_id[: 2 * PEER_ID_CHARS]!r} is not an Ed25519 peer id such as 12D3KooW..."
    if len(peer_id) != PEER_ID_CHARS:
        raise IdentityError(problem)
    try:
        decoded = base58.b58decode(peer_id)
    except ValueError:
        raise IdentityError(problem) from None
    public_key = decoded.removeprefix(_PEER_ID_HEADER)
    # Encoding again refuses spellings that decode to the same bytes, such as surrounding white space.
    if len(public_key) != KEY_BYTES or peer_id_of(public_key) != peer_id:
        raise IdentityError(problem)
    return public_key


def _in_domain(domain: bytes, message: bytes) -> bytes:
    if not 0 < len(domain) <= MAX_DOMAIN_BYTES:
        raise IdentityError(f"domain: must be 1 to {MAX_DOMAIN_BYTES} bytes, is {len(domain)}")
    return _SIGNED_PREFIX + bytes([len(domain)]) + domain + message


def _parse_private_key(blob: bytes) -> Ed25519PrivateKey:
    if len(blob) != _PRIVATE_BYTES or not blob.startswith(_PRIVATE_HEADER):
        raise IdentityError("identity: not an Ed25519 key in libp2p's format; move the file away to get a new one")
    seed = blob[len(_PRIVATE_HEADER) : len(_PRIVATE_HEADER) + KEY_BYTES]
    key = Ed25519PrivateKey.from_private_bytes(seed)
    if key.public_key().public_bytes_raw() != blob[-KEY_BYTES:]:
        raise IdentityError("identity: damaged (its two halves do not match); restore it from a copy")
    return key


def _write_new(path: Path, blob: bytes) -> None:
    """Put a whole file at `path`, or leave the one that another process put there first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # not every file system has hard links
            if not path.exists():
                temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Who may take part in a closed run: a token in its invite, and the tickets that are made with it.

A ticket is a hash under the token of the run and one peer. Every member can check anybody's, nobody learns the token
from one, and it is of no use to another peer: calls and records are signed with the key of the peer that it names.
"""

from __future__ import annotations

import hmac
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.atomic_file import write_atomically
from common.errors import ConfigError
from common.secret_file import read_private

if TYPE_CHECKING:
    from pathlib import Path

TOKEN_BYTES = 32
TICKET_BYTES = 32
NOT_INVITED = "this run admits only those with its invite: join with it"

_DOMAIN = b"kilohive\x00admission/1"


@dataclass(frozen=True)
class Admission:
    """A run and its token. Without a token the run is open: tickets are empty, and none is asked for."""

    run_id: str
    token: bytes = field(default=b"", repr=False)

    @property
    def closed(self) -> bool:
        """Only who has the token takes part."""
        return bool(self.token)

    def ticket(self, peer_id: str) -> bytes:
        """What `peer_id` shows to the others."""
        if not self.token:
            return b""
        fields = (_DOMAIN, self.run_id.encode(), peer_id.encode())
        message = b"".join(struct.pack(">I", len(part)) + part for part in fields)
        return hmac.digest(self.token, message, "sha256")

    def admits(self, peer_id: str, ticket: bytes) -> bool:
        """Whether a peer takes part, by the ticket that it showed."""
        return not self.token or hmac.compare_digest(self.ticket(peer_id), ticket)


OPEN = Admission("")
"""The admission of an open run: it asks for no tickets and gives none."""


def checked_token(token: bytes) -> bytes:
    """A token that somebody gave, or none; raises ConfigError."""
    if len(token) not in {0, TOKEN_BYTES}:
        raise ConfigError(f"admission: must be {TOKEN_BYTES} bytes, is {len(token)}")
    return token


def token_from_hex(text: object) -> bytes:
    """A token as files have it, or none for an empty text; raises ConfigError."""
    try:
        token = bytes.fromhex(text) if isinstance(text, str) else None
    except ValueError:
        token = None
    if token is None:
        raise ConfigError(f"admission: must be {2 * TOKEN_BYTES} hexadecimal digits")
    return checked_token(token)


def owners_token(path: Path, *, create: bool) -> bytes:
    """The token in an owner's file, which is made there with mode 0600 if need be; none if there is no file.

    Raises:
        ConfigError: the file is damaged, unreadable, or open to other users.
    """
    try:
        if not path.exists():
            if not create:
                return b""
            write_atomically(path, f"{os.urandom(TOKEN_BYTES).hex()}\n".encode(), mode=0o600)
        return _read_token(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def _read_token(path: Path) -> bytes:
    text = read_private(path, 4 * TOKEN_BYTES).decode("ascii", "replace").strip()
    if not text:  # a run that its owner closed must not open by accident
        raise ConfigError(f"{path}: is empty; restore it from a copy")
    try:
        return token_from_hex(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None

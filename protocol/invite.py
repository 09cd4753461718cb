"""An invite: all that a stranger needs to join a run, as one line that survives chats, mails and shells.

`kh1` and the base58check of a protobuf message. Letters and digits only: a double click selects it whole. The `1` is
the format's version; the check is the first four bytes of a double SHA-256. It proves nothing about who made it and
needs not: the run id is a hash of the run's manifest, which the owner has signed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import base58

from common.errors import ConfigError, IdentityError
from protocol import invite_pb2
from protocol.admission import checked_token
from protocol.identity import peer_id_of, public_key_of
from protocol.parsing import parse_or_raise
from protocol.swarm_file import MAX_FILE_BYTES, SwarmFile, checked_peers, checked_run_id
from protocol.version import VERSION

FORMAT = 1
MAX_CHARS = 8192
"""Twice what 64 addresses of ordinary length come to."""

SHOWN_CHARS = 40
"""How much is shown of what may be an invite with a mistake in it: its end may be a token."""

_INVITE_START = re.compile(rb"\s*kh[1-9]")
_RUN_ID_LINE = re.compile(rb"^\s*run_id\s*=", re.MULTILINE)
_SHAPE = re.compile(r"kh(?P<format>[1-9])(?P<body>[1-9A-HJ-NP-Za-km-z]+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Invite:
    """A run, peers through which to reach it, its owner, its token if it is closed. `expires_s`: 0 for never."""

    run_id: str
    initial_peers: tuple[str, ...]
    owner: str
    expires_s: int = 0
    admission: bytes = field(default=b"", repr=False)

    def encode(self) -> str:
        """One line of letters and digits."""
        message = invite_pb2.Invite(
            run_id=self.run_id,
            initial_peers=self.initial_peers,
            owner=public_key_of(self.owner),
            expires_s=self.expires_s,
            admission=self.admission,
        )
        body = base58.b58encode_check(message.SerializeToString(deterministic=True))
        return f"kh{FORMAT}{body.decode('ascii')}"

    @classmethod
    def decode(cls, text: str, now_s: float) -> Invite:
        """Read and check an invite; raises ConfigError that says what is wrong with it and what to do."""
        message = _parsed(_payload(text))
        try:
            invite = cls(
                run_id=checked_run_id(message.run_id),
                initial_peers=checked_peers(list(message.initial_peers)),
                owner=peer_id_of(message.owner),
                expires_s=message.expires_s,
                admission=checked_token(message.admission),
            )
        except (ConfigError, IdentityError) as error:
            raise ConfigError(f"invite: {error}") from None
        if 0 < invite.expires_s <= now_s:
            raise ConfigError(f"invite: expired at {_utc_text(invite.expires_s)}; ask the run's owner for a new one")
        return invite


def read_join(text: str, now_s: float) -> Invite | SwarmFile:
    """The invite that a person gave, or what the file that they named holds: an invite, or what swarm.toml has.

    Raises ConfigError that says what is wrong with it.
    """
    if _SHAPE.fullmatch(_joined(text)):
        return Invite.decode(text, now_s)
    data = _file_content(text)
    if _INVITE_START.match(data):
        return Invite.decode(data.decode("ascii", errors="replace"), now_s)
    if not _RUN_ID_LINE.search(data):
        raise ConfigError(f"{text}: holds neither an invite, which begins with kh{FORMAT}, nor what a swarm.toml has")
    return SwarmFile.parse(data, text)


def _file_content(name: str) -> bytes:
    """Not more than a swarm file may have, so that it is bounded before it is read as one."""
    try:
        with Path(name).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        data[:MAX_FILE_BYTES].decode(errors="strict" if len(data) <= MAX_FILE_BYTES else "ignore")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        shown = name[:SHOWN_CHARS]
        raise ConfigError(
            f"invite: {shown!r} is neither an invite, which is kh{FORMAT} and letters and digits, nor a file "
            f"with one or a swarm.toml ({reason})"
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{name}: is longer than {MAX_FILE_BYTES} bytes, so it is neither a file with an invite nor a swarm.toml"
        )
    return data


def _payload(text: str) -> bytes:
    text = _joined(text)
    if len(text) > MAX_CHARS:
        raise ConfigError(f"invite: has more than {MAX_CHARS} characters")
    shape = _SHAPE.fullmatch(text)
    if shape is None:
        raise ConfigError(f"invite: must be letters and digits that begin with kh{FORMAT}, is {text[:40]!r}")
    if int(shape["format"]) != FORMAT:
        raise ConfigError(
            f"invite: is of format {shape['format']}, kilohive {VERSION} reads format {FORMAT}; "
            "install the version that the run's owner uses"
        )
    try:
        return base58.b58decode_check(shape["body"])
    except ValueError:
        raise ConfigError("invite: is damaged or cut short; copy it again, whole") from None


def _joined(text: str) -> str:
    """Mail programs break long lines."""
    return "".join(text.split())


def _parsed(payload: bytes) -> invite_pb2.Invite:
    wrong = ConfigError("invite: its check is right but its content is not an invite; ask for a new one")
    return parse_or_raise(invite_pb2.Invite, payload, lambda _: wrong)


def _utc_text(seconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s after 1970"

"""What a volunteer wants to be called: a name and a team, signed with the node's key. Anonymous is who has none.

A profile goes from its node to whoever collects receipts there. Anybody can take any name: what tells two volunteers
apart is the peer id.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import ConfigError, IdentityError, InvalidInputError, LimitExceededError
from protocol import receipts_pb2 as pb
from protocol.announcements import MAX_TIME_S
from protocol.identity import peer_id_of, verify
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from protocol.identity import Identity

MAX_NAME_CHARS = 32
MAX_PROFILE_BYTES = 512
_DOMAIN = b"profile/1"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A name and a team, either of which may be empty; raises InvalidInputError for what no terminal should show.

    `issued_s` is in whole seconds since 1970; of two profiles of one key the later counts.
    """

    name: str = ""
    team: str = ""
    issued_s: int = 0

    def __post_init__(self) -> None:
        _check_word("name", self.name)
        _check_word("team", self.team)
        if not 0 <= self.issued_s <= MAX_TIME_S:
            raise InvalidInputError("profile.issued_s", f"is {self.issued_s}, no time since 1970")


def chosen_profile(name: str, team: str, now_s: float) -> Profile | None:
    """The profile of a node whose owner has set `name` and `team`; None if both are empty. Raises ConfigError."""
    name, team = (unicodedata.normalize("NFC", word.strip()) for word in (name, team))
    if not name and not team:
        return None
    try:
        return Profile(name=name, team=team, issued_s=int(now_s))
    except InvalidInputError as error:
        raise ConfigError(str(error).removeprefix("profile.")) from None


def sign_profile(identity: Identity, profile: Profile) -> pb.SignedProfile:
    """The profile and its owner's signature."""
    raw = _encode(profile)
    return pb.SignedProfile(profile=raw, public_key=identity.public_key, signature=identity.sign(_DOMAIN, raw))


def open_profile(message: pb.SignedProfile, peer_id: str) -> Profile:
    """What `peer_id` calls itself; InvalidInputError unless it has signed it and every field can be."""
    if len(message.profile) > MAX_PROFILE_BYTES:
        raise LimitExceededError("profile bytes", len(message.profile), MAX_PROFILE_BYTES)
    try:
        verify(message.public_key, _DOMAIN, message.profile, message.signature)
        if peer_id_of(message.public_key) != peer_id:
            raise InvalidInputError("profile.public_key", f"is not that of {peer_id}")
    except IdentityError as error:
        raise InvalidInputError("profile", str(error)) from None
    said = parse_message(pb.Profile, message.profile, "profile")
    return Profile(name=said.name, team=said.team, issued_s=said.issued_s)


def _encode(profile: Profile) -> bytes:
    message = pb.Profile(name=profile.name, team=profile.team, issued_s=profile.issued_s)
    return message.SerializeToString(deterministic=True)


def _check_word(field: str, word: str) -> None:
    """Printable leaves out control characters, line ends, and what turns the direction of writing around."""
    well_formed = word.isprintable() and word == word.strip() and unicodedata.is_normalized("NFC", word)
    if len(word) > MAX_NAME_CHARS or not well_formed:
        raise InvalidInputError(f"profile.{field}", f"must be at most {MAX_NAME_CHARS} printable characters")

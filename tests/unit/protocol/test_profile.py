"""What a volunteer is called: his choice, signed, and nothing that a terminal should not show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, InvalidInputError, LimitExceededError
from protocol import receipts_pb2 as pb
from protocol.identity import Identity
from protocol.profile import MAX_NAME_CHARS, MAX_PROFILE_BYTES, Profile, chosen_profile, open_profile, sign_profile

NOW_S = 1_800_000_000
VOLUNTEER = Identity.generate()
PROFILE = Profile(name="Ada", team="Analytical Engines", issued_s=NOW_S)


def resigned(field: str, value: object) -> pb.SignedProfile:
    """By a volunteer whose program does not check its own fields."""
    message = pb.Profile(name="Ada", issued_s=NOW_S)
    setattr(message, field, value)
    raw = message.SerializeToString()
    return pb.SignedProfile(profile=raw, public_key=VOLUNTEER.public_key, signature=VOLUNTEER.sign(b"profile/1", raw))


def test_a_profile_is_read_as_its_owner_signed_it() -> None:
    assert open_profile(sign_profile(VOLUNTEER, PROFILE), VOLUNTEER.peer_id) == PROFILE
    longest = Profile(name="𝄞" * MAX_NAME_CHARS, team="𝄞" * MAX_NAME_CHARS, issued_s=NOW_S)
    assert len(sign_profile(VOLUNTEER, longest).profile) <= MAX_PROFILE_BYTES


def test_nobody_is_named_by_somebody_else() -> None:
    with pytest.raises(InvalidInputError, match=r"profile\.public_key"):
        open_profile(sign_profile(VOLUNTEER, PROFILE), Identity.generate().peer_id)
    changed = sign_profile(VOLUNTEER, PROFILE)
    changed.public_key = Identity.generate().public_key
    with pytest.raises(InvalidInputError, match="signature"):
        open_profile(changed, VOLUNTEER.peer_id)


@pytest.mark.parametrize(
    "word",
    ["x" * 33, "\x1b[31mred", "two\nlines", "nul\x00", "\u202egnirts", " Ada", "Ada ", "e\u0301"],
    ids=["long", "escape", "line end", "nul", "turned around", "blank before", "blank behind", "not composed"],
)
@pytest.mark.parametrize("field", ["name", "team"])
def test_a_word_that_no_terminal_should_show_is_refused(field: str, word: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"profile\.{field}: must be at most 32 printable characters"):
        open_profile(resigned(field, word), VOLUNTEER.peer_id)


def test_a_profile_from_no_time_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"profile\.issued_s"):
        open_profile(resigned("issued_s", 1 << 60), VOLUNTEER.peer_id)


def test_a_long_profile_is_refused_unread() -> None:
    with pytest.raises(LimitExceededError, match=f"{MAX_PROFILE_BYTES}"):
        open_profile(pb.SignedProfile(profile=bytes(MAX_PROFILE_BYTES + 1)), VOLUNTEER.peer_id)


@given(st.binary(max_size=100))
def test_any_bytes_that_are_signed_are_a_profile_or_a_typed_error(raw: bytes) -> None:
    signature = VOLUNTEER.sign(b"profile/1", raw)
    message = pb.SignedProfile(profile=raw, public_key=VOLUNTEER.public_key, signature=signature)
    try:
        profile = open_profile(message, VOLUNTEER.peer_id)
    except InvalidInputError:
        return
    assert (profile.name + profile.team).isprintable()


@given(st.text(max_size=60), st.text(max_size=60))
def test_what_an_owner_sets_is_a_profile_that_others_take_or_one_sentence(name: str, team: str) -> None:
    try:
        profile = chosen_profile(name, team, NOW_S)
    except ConfigError:
        assert not (name + team).isprintable() or max(len(name), len(team)) > MAX_NAME_CHARS
        return
    if profile is None:
        assert not name.strip()
        assert not team.strip()
        return
    assert open_profile(sign_profile(VOLUNTEER, profile), VOLUNTEER.peer_id) == profile


def test_who_sets_nothing_is_anonymous_and_blanks_around_a_name_do_not_count() -> None:
    assert chosen_profile("", " ", NOW_S) is None
    assert chosen_profile(" Ada ", "Cafe\u0301", NOW_S + 0.5) == Profile(name="Ada", team="Café", issued_s=NOW_S)
    with pytest.raises(ConfigError, match=r"^name: must be at most 32"):
        chosen_profile("x" * 33, "", NOW_S)

"""Tickets of a closed run hold for one peer of one run; its owner keeps the token to himself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError
from protocol.admission import TICKET_BYTES, Admission, owners_token, token_from_hex
from protocol.identity import peer_id_of

if TYPE_CHECKING:
    from pathlib import Path

ME, OTHER = (peer_id_of(bytes([n] * 32)) for n in (1, 2))
CLOSED = Admission("demo-0123456789ab", bytes(range(32)))


def test_who_has_the_token_is_admitted() -> None:
    assert len(CLOSED.ticket(ME)) == TICKET_BYTES
    assert CLOSED.admits(ME, replace(CLOSED).ticket(ME))


@pytest.mark.parametrize(
    "ticket",
    [
        CLOSED.ticket(OTHER),
        Admission("demo-other", CLOSED.token).ticket(ME),
        Admission(CLOSED.run_id, bytes(32)).ticket(ME),
        CLOSED.ticket(ME)[:-1],
        CLOSED.token,
        b"",
    ],
    ids=["another peer's", "another run's", "of another token", "cut short", "the token itself", "none"],
)
def test_any_other_ticket_is_refused(ticket: bytes) -> None:
    assert not CLOSED.admits(ME, ticket)


def test_an_open_run_admits_everybody_and_gives_no_tickets() -> None:
    run = Admission(CLOSED.run_id)
    assert (run.closed, run.ticket(ME)) == (False, b"")
    assert run.admits(ME, b"")
    assert run.admits(ME, CLOSED.ticket(OTHER))


def test_a_token_is_not_shown() -> None:
    assert repr(CLOSED) == "Admission(run_id='demo-0123456789ab')"


def test_an_owners_token_is_made_once_and_only_if_he_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "admission.token"
    assert owners_token(path, create=False) == b""
    assert not path.exists()
    token = owners_token(path, create=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert token == owners_token(path, create=False) == owners_token(path, create=True)
    assert token != owners_token(tmp_path / "another.token", create=True)


def test_an_owners_token_that_others_can_read_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    path = tmp_path / "admission.token"
    owners_token(path, create=True)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"other users can read it; run: chmod 600 .*admission\.token"):
        owners_token(path, create=False)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "is empty"), ("00", "must be 32 bytes, is 1"), ("é" * 9, "64 hexadecimal digits")],
    ids=["empty", "short", "no digits"],
)
def test_a_damaged_owners_token_does_not_open_the_run(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "admission.token"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=rf"admission\.token: .*{problem}"):
        owners_token(path, create=True)


def test_a_token_in_a_file_is_a_text_of_digits() -> None:
    assert token_from_hex(CLOSED.token.hex()) == CLOSED.token
    assert token_from_hex("") == b""
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        token_from_hex(7)

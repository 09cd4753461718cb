"""What the login manager tells of screens and terminals, as `loginctl` of systemd 252 and 257 prints it."""

from __future__ import annotations

import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from node.limits import sessions as sessions_module
from node.limits.finding import Finding
from node.limits.sessions import PERSON, NoLoginManagerError, Sessions, ask_loginctl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOW_S = 1_800_000_000.0
INPUT_AGE_S = 180.0


def told(**changes: str) -> str:
    """A desktop that somebody uses; of a screen `IdleSinceHint` is when the hint last changed."""
    properties = {
        "Type": "wayland",
        "Class": "user",
        "Active": "yes",
        "State": "active",
        "IdleHint": "no",
        "IdleSinceHint": "1799990000000000",
        "LockedHint": "no",
    }
    return "".join(f"{name}={value}\n" for name, value in {**properties, **changes}.items())


def typed(seconds_ago: float) -> str:
    since = str(round((NOW_S - seconds_ago) * 1e6))
    return told(Type="tty", IdleHint="no", IdleSinceHint=since)


def look(*blocks: str, names: str = "") -> Finding:
    listed = names or "".join(f"{i:>7} 1000 ada  seat0 tty2\n" for i in range(len(blocks)))

    def ask(command: str, *words: str) -> str:
        if command == "list-sessions":
            return listed
        assert command == "show-session"
        assert [word for word in words if not word.startswith("--")] == [str(i) for i in range(len(blocks))]
        return "\n".join(blocks)

    return Sessions(INPUT_AGE_S, ask, lambda: NOW_S).look()


@pytest.mark.parametrize(
    ("blocks", "finding"),
    [
        pytest.param((), Finding(), id="nobody is logged in"),
        pytest.param((told(),), PERSON, id="somebody at a desktop"),
        pytest.param((told(Type="x11"),), PERSON, id="the same on X11"),
        pytest.param((told(IdleHint="yes"),), Finding(), id="a desktop that is idle"),
        pytest.param((told(LockedHint="yes"),), Finding(), id="a desktop that is locked"),
        pytest.param((told(IdleSinceHint="0"),), PERSON, id="a desktop that has never said whether it is idle"),
        pytest.param((told(Active="no", State="online"),), Finding(), id="a desktop in the background"),
        pytest.param((told(State="closing"),), Finding(), id="somebody who has just logged out"),
        pytest.param((told(Class="greeter"),), Finding(), id="a screen to log in at"),
        pytest.param((told(Class="manager", Type="unspecified"),), Finding(), id="a user's services"),
        pytest.param((told(Class="background", Type="unspecified"),), Finding(), id="a job of cron"),
        pytest.param((told(Class="user-early"),), PERSON, id="an administrator who logged in early"),
        pytest.param((told(IdleHint="yes"), told(Type="x11")), PERSON, id="two desktops, of which one is used"),
        pytest.param((typed(INPUT_AGE_S - 1),), PERSON, id="somebody who types over ssh"),
        pytest.param((typed(INPUT_AGE_S + 1),), Finding(), id="somebody who does not any more"),
        pytest.param((told(Type="tty", IdleSinceHint="0"),), Finding(), id="a terminal that tells nothing"),
    ],
)
def test_a_person_is_known_by_screens_and_terminals(blocks: tuple[str, ...], finding: Finding) -> None:
    assert look(*blocks) == finding


def test_a_session_that_has_gone_meanwhile_is_no_person() -> None:
    assert look("", "\n") == Finding()


def test_words_that_are_no_names_of_sessions_are_not_passed_on() -> None:
    assert look(names="--help 1000\n\n   \n") == Finding()


def test_without_a_login_manager_it_is_not_known_and_counts_as_nobody() -> None:
    def ask(*_: str) -> str:
        raise NoLoginManagerError("there is no loginctl here")

    finding = Sessions(INPUT_AGE_S, ask).look()
    assert finding.against == ""
    assert finding.unknown == (
        "whether somebody uses keyboard or mouse is not known (there is no loginctl here): it counts as nobody, but "
        "for what is typed at terminals"
    )


@pytest.fixture
def loginctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A `loginctl` that is a script of the test's."""

    def write(script: str) -> None:
        path = tmp_path / "loginctl"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return write


def test_loginctl_is_asked_in_english_and_without_a_pager(loginctl: Callable[[str], None]) -> None:
    loginctl('echo "$LC_ALL $*"')
    assert ask_loginctl("list-sessions") == "C --no-pager list-sessions\n"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            'echo "Not booted with systemd" >&2; echo "Failed to connect to bus: Host is down" >&2; exit 1',
            "loginctl says: Failed to connect to bus: Host is down",
        ),
        ("exit 3", "loginctl says: exit code 3"),
        ("exec sleep 60", "loginctl did not answer in 0.05 s"),
    ],
)
def test_a_loginctl_that_does_not_answer_is_a_sentence(
    script: str, words: str, loginctl: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "TIMEOUT_S", 0.05 if "sleep" in script else 10.0)
    loginctl(script)
    with pytest.raises(NoLoginManagerError) as caught:
        ask_loginctl("list-sessions")
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("error", "words"),
    [(None, "there is no loginctl here"), (OSError(8, "Exec format error"), "cannot be run: Exec format error")],
)
def test_a_machine_without_a_loginctl_that_runs_is_a_sentence(
    error: OSError | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        assert error is not None
        raise error

    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/loginctl" if error else None)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(NoLoginManagerError, match=words):
        ask_loginctl("list-sessions")

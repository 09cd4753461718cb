"""Whether somebody sits at this machine, as systemd's login manager tells of its sessions.

A desktop tells the login manager that its user is idle (`IdleHint`), after a time that is set there, and that the
screen is locked (`LockedHint`); some tell only the one, or only the other. Of a text session `IdleSinceHint` is when
somebody last typed. `loginctl` asks: a process every few seconds costs less than a D-Bus library, and can be timed out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.text import last_line
from node.limits.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

TIMEOUT_S = 2.0
MAX_SESSIONS = 64
GRAPHICAL = frozenset({"x11", "wayland", "mir"})
PROPERTIES = ("Class", "Type", "State", "Active", "IdleHint", "IdleSinceHint", "LockedHint")

PERSON = Finding(against="somebody uses the machine's keyboard or mouse")


class NoLoginManagerError(Exception):
    """Nobody tells of this machine's sessions; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A person's session, a screen or a terminal. `input_s`: when somebody last typed there, seconds since 1970, or 0.

    Of a screen `away` says whether it is idle, locked or in the background; a terminal has none.
    """

    graphical: bool
    away: bool
    input_s: float

    def in_use(self, now_s: float, input_age_s: float) -> bool:
        """Whether somebody is there: at a terminal, who has typed in the last `input_age_s` seconds."""
        return not self.away if self.graphical else now_s - self.input_s < input_age_s


class Sessions:
    """Looks whether somebody uses a screen, or has typed at a terminal in the last `input_age_s` seconds."""

    def __init__(
        self,
        input_age_s: float,
        ask: Callable[..., str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._input_age_s, self._ask, self._clock = input_age_s, ask or ask_loginctl, clock

    def look(self) -> Finding:
        """Ask the login manager. Blocks, for no longer than twice TIMEOUT_S."""
        try:
            sessions = self._read()
        except NoLoginManagerError as error:
            return Finding(
                unknown=f"whether somebody uses keyboard or mouse is not known ({error}): it counts as nobody, but for "
                "what is typed at terminals"
            )
        now_s = self._clock()
        return PERSON if any(session.in_use(now_s, self._input_age_s) for session in sessions) else Finding()

    def _read(self) -> list[Session]:
        listed = (line.split() for line in self._ask("list-sessions", "--no-legend").splitlines())
        names = [words[0] for words in listed if words and words[0].isalnum()][:MAX_SESSIONS]
        if not names:
            return []
        flags = [f"--property={name}" for name in PROPERTIES]
        told = self._ask("show-session", *flags, *names)
        return list(parse_sessions(told.split("\n\n")))


def parse_sessions(blocks: Iterable[str]) -> Iterable[Session]:
    """The sessions of persons, of which each block has lines of NAME=VALUE: no login screens, no services."""
    for block in blocks:
        told = dict(line.partition("=")[::2] for line in block.splitlines())
        if told.get("Class", "").startswith("user") and told.get("State") != "closing":
            yield _session(told)


def _session(told: Mapping[str, str]) -> Session:
    since = told.get("IdleSinceHint", "")
    return Session(
        graphical=told.get("Type") in GRAPHICAL,
        away=told.get("Active") != "yes" or "yes" in {told.get("IdleHint"), told.get("LockedHint")},
        input_s=int(since) / 1e6 if since.isdecimal() else 0.0,
    )


def ask_loginctl(*words: str) -> str:
    """What `loginctl` answers; raises NoLoginManagerError if it does not."""
    program = shutil.which("loginctl")
    if program is None:
        raise NoLoginManagerError("there is no loginctl here")
    argv = (program, "--no-pager", *words)
    environment = {**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0"}
    try:
        done = subprocess.run(
            argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except OSError as error:
        raise NoLoginManagerError(f"loginctl cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NoLoginManagerError(f"loginctl did not answer in {TIMEOUT_S:g} s") from None
    if done.returncode:
        why = last_line(done.stderr.decode("ascii", "replace")) or f"exit code {done.returncode}"
        raise NoLoginManagerError(f"loginctl says: {why}")
    return done.stdout.decode("ascii", "replace")

"""`pause`, `resume` and `leave`: tell the host of a folder on this machine, or in this container, what its owner wants.

A host writes to `server.json` which process it is. That process is sent a signal, if it is the one that began when the
file says, and tells in its event log what it makes of it. Light: no torch here.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import psutil

from common.durations import parse_duration
from common.errors import ConfigError, InvalidInputError, UnavailableError
from common.events import Event, read_event
from common.log_files import LogReader, end_of_log
from common.settings import check_minimums
from common.text import moment_text
from node.host.events import AskedEvent, HandedOverEvent, HostLeaveEvent, LeavingEvent, PausedEvent, ResumedEvent
from node.host.owner_pause import MAX_PAUSE_S, PAUSE_FILE, WantedPause, write_pause
from node.host.signals import SIGNALS
from node.rpc.health import MAX_FILE_BYTES, SERVER_FILE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from node.host.config import ControlConfig, PauseConfig

LOOK_S = 0.1
CLOCK_SLACK_S = 60.0
"""How far two readings of when a process began may differ: the machine's clock may have been set meanwhile."""

E = TypeVar("E", bound=Event)


async def run_pause(config: PauseConfig, _stop: asyncio.Event) -> None:
    """Returns once the host has paused."""
    duration_s = parse_duration("pause", config.duration) if config.duration else None
    if duration_s is not None and duration_s > MAX_PAUSE_S:
        raise ConfigError(f"pause: {config.duration} is longer than 30d; without a duration it lasts until `resume`")
    async with _talk(config, "pause", duration_s) as talk:
        asked = await talk.wait_for(AskedEvent)
        if not asked.paused:
            await talk.wait_for(PausedEvent)
        until = "" if asked.until_s is None else f" until {moment_text(asked.until_s)}"
        _say(f"paused{until}, with its blocks stored in {config.state}")


async def run_resume(config: ControlConfig, _stop: asyncio.Event) -> None:
    """Returns once the host works again, or has said what else keeps it from working."""
    async with _talk(config, "resume") as talk:
        asked = await talk.wait_for(AskedEvent)
        if asked.reasons:
            _say(f"no longer paused by its owner, but {' and '.join(asked.reasons)}")
            return
        blocks = (await talk.wait_for(ResumedEvent)).blocks if asked.paused else None
        _say("it works" if blocks is None else f"it works again, with {blocks} blocks")


async def run_leave(config: ControlConfig, _stop: asyncio.Event) -> None:
    """Returns once the host's process has ended; tells what it does until then."""
    async with _talk(config, "leave") as talk:
        await talk.wait_for(AskedEvent)
        while talk.runs():
            _tell_leaving(talk)
            await asyncio.sleep(LOOK_S)
        _tell_leaving(talk)
        _say("left")


async def ask_host(config: ControlConfig, word: str, duration_s: float | None = None) -> AskedEvent:
    """Say pause, resume or leave, and return what the host heard, not waiting until it has done so.

    `duration_s`: how long a pause is to last, None for one without end. UnavailableError if nobody hears it.
    """
    async with _talk(config, word, duration_s) as talk:
        return await talk.wait_for(AskedEvent)


@asynccontextmanager
async def _talk(config: ControlConfig, word: str, duration_s: float | None = None) -> AsyncIterator[_Talk]:
    """One word to a host, and its answers. UnavailableError if nobody hears it, or obeys within `timeout_s`.

    `duration_s`: how long a pause is to last, None for one without end.
    """
    check_minimums(config, {"timeout_s": 0.1})
    talk = _Talk(config.state)
    if word == "pause":
        _keep(config.state, duration_s)
    try:
        async with asyncio.timeout(config.timeout_s):
            talk.send(word)
            yield talk
    except TimeoutError:
        raise UnavailableError(f"{config.state}: its host did not {word} in {config.timeout_s:g} s") from None


class _Talk:
    """A talk with the host of a folder."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._process = read_process(state)
        self._log = state / "events.jsonl"
        self._reader = LogReader(self._log, end_of_log(self._log))
        self._heard: deque[bytes] = deque()

    def send(self, word: str) -> None:
        """The signal that stands for it."""
        try:
            self._process.send_signal(SIGNALS[word])
        except psutil.AccessDenied:
            raise UnavailableError(f"{self._state}: its host runs as another user") from None
        except psutil.NoSuchProcess:
            raise _nobody(self._state) from None

    async def wait_for(self, kind: type[E]) -> E:
        """The next event of that kind."""
        while True:
            for event in self.heard(kind):
                return event
            if not self.runs():
                raise UnavailableError(f"{self._state}: its host has ended")
            await asyncio.sleep(LOOK_S)

    def heard(self, *kinds: type[E]) -> Iterator[E]:
        """Events of these kinds since the last one that was taken; UnavailableError for one that makes no sense."""
        self._heard.extend(self._reader.new_lines())
        while self._heard:
            try:
                event = read_event(self._heard.popleft(), *kinds)
            except InvalidInputError as error:
                raise UnavailableError(f"{self._log}: {error}; is its host of another version?") from None
            if event is not None:
                yield event

    def runs(self) -> bool:
        """Whether the host's process is there."""
        return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE


def read_process(state: Path) -> psutil.Process:
    """The process of the host whose folder this is; UnavailableError if there is none, ConfigError for another node."""
    path = state / SERVER_FILE
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(MAX_FILE_BYTES))
    except FileNotFoundError:
        raise _nobody(state) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    pid, started_s = (told.get(name) if isinstance(told, dict) else None for name in ("pid", "started_s"))
    if type(pid) is not int or not 0 < pid < 1 << 31 or not isinstance(started_s, int | float):
        raise ConfigError(f"{path}: is not of a host that can be told to pause, resume or leave")
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started_s) < CLOCK_SLACK_S and pid != os.getpid()
    except psutil.NoSuchProcess:
        raise _nobody(state) from None
    if not same:
        raise UnavailableError(f"{state}: its host has ended, or runs in a container: use `docker exec` then")
    return process


def _keep(state: Path, duration_s: float | None) -> None:
    """Write what a signal cannot carry, to where the host reads it when it hears the signal."""
    try:
        write_pause(state, WantedPause(until_s=None if duration_s is None else int(time.time() + duration_s)))
    except OSError as error:
        raise UnavailableError(f"{state / PAUSE_FILE}: cannot be written: {error.strerror}") from None


def _tell_leaving(talk: _Talk) -> None:
    for event in talk.heard(LeavingEvent, HandedOverEvent, HostLeaveEvent):
        match event:
            case LeavingEvent():
                _say(f"handing {event.blocks} blocks over")
            case HandedOverEvent(left=left):
                nobody = f"; nobody has taken {', '.join(left)}" if left else ""
                _say(f"others serve {event.blocks} of them{nobody}")
            case HostLeaveEvent():
                _say("withdrawing its records")


def _nobody(state: Path) -> UnavailableError:
    return UnavailableError(f"{state}: no host runs from this folder")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

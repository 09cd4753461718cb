"""Runs a role of the command to its end: its event loop, and the signals that ask it to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from common.standard_streams import watch_stdin

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import trio

    Role = Callable[[Any, Any], Awaitable[int | None]]

EXIT_INTERRUPTED: Final = 130
SHOW_CURSOR: Final = "\x1b[?25h"


class RoleEnd(NamedTuple):
    """How a role has ended: the exit code that it returned, if any, and whether it had been asked to stop."""

    code: int | None
    was_stopped: bool


def exit_at_interrupts() -> None:
    """End the process at once at Ctrl+C: there is nothing to stop, and an import of torch would leave a long trace."""
    signal.signal(signal.SIGINT, _exit_now)


def run_on_uvloop(load: Callable[[], Role], config: object, *, stop_on_stdin_eof: bool) -> RoleEnd:
    """Run the role that `load` imports, with a `stop` event that signals set and, if asked for, the end of stdin."""
    import uvloop  # noqa: PLC0415 - not needed for help

    role = load()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return _ended(runner.run(_until_done(role, config, stop_on_stdin_eof)))


def run_on_trio(load: Callable[[], Role], config: object, *, stop_on_stdin_eof: bool) -> RoleEnd:
    """Do as `run_on_uvloop` does, under trio."""
    role = load()
    import trio  # noqa: PLC0415 - an extra, which hosts and trainers do not need; `load` says so where it is missing

    return _ended(trio.run(_until_done_on_trio, role, config, stop_on_stdin_eof))


def _ended(end: RoleEnd) -> RoleEnd:
    """Have later signals find nothing to stop: a closed terminal signals more than once."""
    exit_at_interrupts()
    signal.signal(signal.SIGHUP, _hear_nothing)
    return end


async def _until_done(role: Role, config: object, stop_on_stdin_eof: bool) -> RoleEnd:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, _stop_or_exit, stop)
    for number in _stop_signals():
        loop.add_signal_handler(number, stop.set)
    if stop_on_stdin_eof:
        watch_stdin(lambda: loop.call_soon_threadsafe(stop.set))
    return RoleEnd(await role(config, stop), stop.is_set())


async def _until_done_on_trio(role: Role, config: object, stop_on_stdin_eof: bool) -> RoleEnd:
    import trio  # noqa: PLC0415 - see run_on_trio

    stop = trio.Event()
    if stop_on_stdin_eof:
        token = trio.lowlevel.current_trio_token()
        watch_stdin(lambda: token.run_sync_soon(stop.set))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_at_signals, stop)
        code = await role(config, stop)
        nursery.cancel_scope.cancel()
    return RoleEnd(code, stop.is_set())


async def _stop_at_signals(stop: trio.Event) -> None:
    import trio  # noqa: PLC0415 - see run_on_trio

    with trio.open_signal_receiver(signal.SIGINT, *_stop_signals()) as signals:
        async for number in signals:
            if number == signal.SIGINT:
                _stop_or_exit(stop)
            stop.set()


def _stop_signals() -> list[signal.Signals]:
    """Signals that ask for a clean stop, beside Ctrl+C's: a closed terminal's too, unless nohup has it ignored."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, *hung_up]


def _stop_or_exit(stop: asyncio.Event | trio.Event) -> None:
    """The first Ctrl+C asks, the second one does not."""
    if stop.is_set():
        _exit_now()
    stop.set()


def _exit_now(*_signal: object) -> None:
    if sys.stdout.isatty():
        with contextlib.suppress(OSError):  # the terminal has just been closed
            os.write(sys.stdout.fileno(), SHOW_CURSOR.encode())
    os._exit(EXIT_INTERRUPTED)


def _hear_nothing(*_signal: object) -> None:
    """A process that has done its work and saved it ends as it would."""

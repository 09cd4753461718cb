"""A socket in a host's folder, at which its owner's page asks what the host does and changes its limits.

A line of JSON is answered by a line of JSON. Who may write to the socket is the user that the host runs as. Light: no
torch here, as the page's process asks through `ask`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from common.errors import InvalidInputError, KilohiveError, UnavailableError
from common.unix_socket import connected_unix_socket, listening_unix_socket

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Told = dict[str, Any]

logger = logging.getLogger(__name__)

SOCKET_FILE: Final = "owner.sock"
STATUS, LIMITS = "status", "limits"
MAX_ASKED_BYTES: Final = 16_384
MAX_TOLD_BYTES: Final = 4 << 20
MAX_AT_ONCE: Final = 16
READ_S: Final = 5.0
ANSWER_S: Final = 60.0
"""How long an answer may take: blocks that no longer fit are given up before a change of limits is answered."""


@asynccontextmanager
async def owner_told(
    folder: Path, status: Callable[[], Told], change: Callable[[object], Awaitable[None]]
) -> AsyncIterator[None]:
    """Answer in `folder` while the context lasts; where no socket can be made there, a warning says so and no more."""
    path, desk = folder / SOCKET_FILE, _Desk(status, change)
    try:
        server = await asyncio.start_unix_server(desk.serve, sock=listening_unix_socket(path), limit=MAX_ASKED_BYTES)
    except OSError as error:
        logger.warning("%s: cannot be made, so this host's page stays empty: %s", path, error.strerror or error)
        yield
        return
    try:
        yield
    finally:
        server.close()
        await desk.close()
        path.unlink(missing_ok=True)


async def ask(folder: Path, what: str, limits: object = None) -> Told:
    """What the host of a folder answers.

    Raises:
        UnavailableError: no host runs from the folder, or it does not answer.
        InvalidInputError: the host refuses.
    """
    try:
        async with asyncio.timeout(ANSWER_S):
            answer = await _ask(folder / SOCKET_FILE, {"ask": what, "limits": limits})
    except TimeoutError:
        raise UnavailableError(f"{folder}: its host does not answer") from None
    except (OSError, ValueError):
        raise UnavailableError(f"{folder}: no host runs from this folder, or it is of another version") from None
    if "error" in answer:
        field, _, problem = str(answer["error"]).partition(": ")
        raise InvalidInputError(field, problem)
    return answer


async def _ask(path: Path, asked: Told) -> Told:
    reader, writer = await asyncio.open_unix_connection(sock=await connected_unix_socket(path), limit=MAX_TOLD_BYTES)
    try:
        writer.write(_line(asked))
        answer = json.loads(await reader.readline())
    finally:
        await _close(writer)
    if not isinstance(answer, dict):
        raise ValueError  # noqa: TRY004 - told like an answer that is no JSON
    return answer


class _Desk:
    """Answers one line of each caller, and a bounded number of callers at once."""

    def __init__(self, status: Callable[[], Told], change: Callable[[object], Awaitable[None]]) -> None:
        self._status, self._change = status, change
        self._serving = set[asyncio.Task[None]]()

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Answer a caller, and close."""
        task = asyncio.current_task()
        try:
            if task is not None and len(self._serving) < MAX_AT_ONCE:
                self._serving.add(task)
                async with asyncio.timeout(READ_S):
                    line = await reader.readline()
                writer.write(_line(await self._answer(line)))
                async with asyncio.timeout(READ_S):
                    await writer.drain()
        except (OSError, ValueError, TimeoutError):  # who asks too much, too slowly, or has gone
            pass
        finally:
            if task is not None:
                self._serving.discard(task)
            await _close(writer)

    async def close(self) -> None:
        """End what is being answered."""
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _answer(self, line: bytes) -> Told:
        try:
            asked = json.loads(line)
        except ValueError:
            asked = None
        try:
            match asked:
                case {"ask": "status"}:
                    return self._status()
                case {"ask": "limits", "limits": limits}:
                    async with asyncio.timeout(ANSWER_S):
                        await self._change(limits)
                    return {}
        except KilohiveError as error:
            return {"error": str(error)}
        return {"error": "ask: must be the status, or limits by name"}


async def _close(writer: StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _line(told: Told) -> bytes:
    return json.dumps(told, separators=(",", ":")).encode() + b"\n"

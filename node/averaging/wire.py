"""The stream under an exchange or a download: raw messages each way, counted, bounded, with deadlines.

Whatever carries the bytes is a `Stream`: gRPC from either side, or memory in tests.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from node.serving.guard import parse
from protocol import averaging_pb2 as pb
from protocol.errors import DeadlineError, InvalidInputError, LimitExceededError, UnavailableError
from protocol.limits import MAX_OFFERED_BLOCKS, MAX_PIECE_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from typing import Any

MAX_PIECE_MESSAGE_BYTES = 2 * MAX_PIECE_BYTES
MAX_OFFER_MESSAGE_BYTES = 1024 + 128 * MAX_OFFERED_BLOCKS


class Receiver(Protocol):
    """The receiving half of a stream of messages."""

    async def receive(self) -> bytes | None:
        """The next message, None when the other side sends no more.

        Raises:
            KilohiveError: the partner's own, or UnavailableError when it is gone.
        """


class Stream(Receiver, Protocol):
    """One bidirectional stream of messages."""

    async def send(self, raw: bytes) -> None:
        """Send one message; raises like `receive`."""


class Inbox:
    """Messages that come; `n_bytes` counts them."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.n_bytes = 0

    async def receive(self) -> bytes:
        """The next message; UnavailableError when the other side has closed."""
        raw = await self.receive_or_end()
        if raw is None:
            raise UnavailableError("the partner closed the stream in the middle of a block")
        return raw

    async def receive_or_end(self) -> bytes | None:
        """The next message, or None."""
        raw = await self._receiver.receive()
        self.n_bytes += len(raw or b"")
        return raw


class Wire(Inbox):
    """Messages both ways; `n_bytes` counts both."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self._stream = stream

    async def send(self, raw: bytes) -> None:
        """Send one serialised message."""
        self.n_bytes += len(raw)
        await self._stream.send(raw)


def unpack(raw: bytes, max_bytes: int) -> pb.ExchangeMessage:
    """A peer's message; raises LimitExceededError before it is parsed, InvalidInputError when it is cut off."""
    if len(raw) > max_bytes:
        raise LimitExceededError("message bytes", len(raw), max_bytes)
    return parse(pb.ExchangeMessage, raw)


def require(message: pb.ExchangeMessage, *kinds: str) -> str:
    """Which of `kinds` a message is; InvalidInputError if none."""
    kind = message.WhichOneof("body") or "empty"
    if kind not in kinds:
        raise InvalidInputError("message", f"is {kind}, must be {' or '.join(kinds)} now")
    return kind


@asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """DeadlineError when the body takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineError(f"{what} took longer than {seconds:.1f} s") from None


async def both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Run two coroutines at once; the first error of either ends both and is raised."""
    tasks = [asyncio.create_task(first), asyncio.create_task(second)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

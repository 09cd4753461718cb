"""The stream under an exchange or a download: raw messages each way, counted, bounded, with deadlines.

Whatever carries the bytes is a `MessageStream`: gRPC from either side, or memory in tests.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from common.errors import DeadlineError, KilohiveError, UnavailableError
from node.limits.rate_limits import RateLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

T = TypeVar("T")

logger = logging.getLogger(__name__)

ALIVE = b""
"""A message without a body."""

ALIVE_PER_SILENCE = 4
MAX_REST_S = 4.0
"""The longest rest before the next message is read: a partner of an older release, which does not hear meanwhile that
this side is alive, believes it dead after 5 s. What is owed beyond that is left to whoever takes something next."""

MAX_HEARD = 16
"""Messages that are read ahead while a send is stuck: twice an exchange's window, so that what says that the partner is
alive is not left behind them."""


class Receiver(Protocol):
    """The receiving half of a stream of messages."""

    async def receive(self) -> bytes | None:
        """The next message, None when the other side sends no more.

        Raises:
            KilohiveError: the partner's own, or UnavailableError when it is gone.
        """


class MessageStream(Receiver, Protocol):
    """One bidirectional stream of messages."""

    async def send(self, raw: bytes) -> None:
        """Send one message; raises like `receive`."""


class Inbox:
    """Messages that come; `n_bytes` counts them. Empty ones only say that the partner is alive, and are passed over.

    After a message it rests as long as `rate_limits` ask for.
    """

    def __init__(self, receiver: Receiver, rate_limits: RateLimits | None = None) -> None:
        self._receiver, self._rate_limits = receiver, rate_limits or RateLimits()
        self.n_bytes = 0

    async def receive(self) -> bytes:
        """The next message; UnavailableError when the other side has closed."""
        raw = await self.receive_or_end()
        if raw is None:
            raise UnavailableError("the partner closed the stream in the middle of a block")
        return raw

    async def receive_or_end(self) -> bytes | None:
        """The next message, or None."""
        while (raw := await self._next()) == ALIVE:
            pass
        if raw:
            self.n_bytes += len(raw)
            rest_s = min(self._rate_limits.received(len(raw)), MAX_REST_S)
            if rest_s:
                await self._rest(rest_s)
        return raw

    async def _next(self) -> bytes | None:
        return await self._receiver.receive()

    async def _rest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Wire(Inbox):
    """Messages both ways; `n_bytes` counts both.

    The caller gets a DeadlineError after `silence_s` in which nothing has passed in either direction: a
    partner that is frozen, its connection still open, costs no more than that. One that is slow costs what it takes: it
    says that it is alive, and that is heard also while a message to it is stuck. Use it in `async with`.
    """

    def __init__(self, stream: MessageStream, silence_s: float, rate_limits: RateLimits | None = None) -> None:
        super().__init__(stream, rate_limits)
        self._stream, self._silence_s = stream, silence_s
        self._waiting: set[asyncio.Timeout] = set()
        self._one_send = asyncio.Lock()
        self._heard: deque[bytes | None] = deque()
        self._listening: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._listen_no_more()

    async def send(self, raw: bytes) -> None:
        """Send one serialised message, then rest as long as the rate limit asks for."""
        self.n_bytes += len(raw)
        await self._pass_on(raw)
        rest_s = self._rate_limits.sent(len(raw)) if raw else 0.0
        if rest_s:
            await self._rest(rest_s)

    async def while_alive(self, work: Awaitable[T]) -> T:
        """Await what may take longer than a partner bears silence; it is told meanwhile that this side is alive."""
        future = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({future}, timeout=self._beat_s))[0]:
                # A send that is under way waits for the partner, which has something to hear then.
                if not self._one_send.locked():
                    await self.send(ALIVE)
        except KilohiveError as error:
            # No reason to leave a replica where it is: it may be the last to move. The next message tells.
            logger.debug("A partner is gone while this side works: %s", error)
            return await future
        finally:
            if not future.done():
                future.cancel()
                await asyncio.wait({future})
        return future.result()

    @property
    def _beat_s(self) -> float:
        return self._silence_s / ALIVE_PER_SILENCE

    async def _rest(self, seconds: float) -> None:
        await self.while_alive(asyncio.sleep(seconds))

    async def _pass_on(self, raw: bytes) -> None:
        async with self._not_silent(), self._one_send:
            sending = asyncio.ensure_future(self._stream.send(raw))
            try:
                while not (await asyncio.wait({sending}, timeout=self._beat_s))[0]:
                    # Only what the partner says can tell now that it takes its time.
                    if len(self._heard) < MAX_HEARD and None not in self._heard:
                        self._listen()
                sending.result()
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _next(self) -> bytes | None:
        async with self._not_silent():
            while not self._heard:
                listening = self._listen()
                await asyncio.wait({listening})
                listening.result()
        return self._heard.popleft()

    def _listen(self) -> asyncio.Task[None]:
        """What hears one message, whoever waits for it: two reads at once would mix up a stream."""
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._hear(), name="listen to a partner")
            self._listening.add_done_callback(_retrieve)
        return self._listening

    async def _listen_no_more(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _hear(self) -> None:
        raw = await super()._next()
        if raw != ALIVE:
            self._heard.append(raw)
        self._something_passed()

    def _something_passed(self) -> None:
        until_s = asyncio.get_running_loop().time() + self._silence_s
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(until_s)

    @asynccontextmanager
    async def _not_silent(self) -> AsyncIterator[None]:
        limit = asyncio.timeout(self._silence_s)
        self._waiting.add(limit)
        passed = False
        try:
            async with limit:
                yield
            passed = True
        except TimeoutError:
            raise DeadlineError(f"the partner has been silent for {self._silence_s:g} s") from None
        finally:
            self._waiting.discard(limit)
            if not passed and not self._waiting:
                await self._listen_no_more()
        self._something_passed()


def _retrieve(listening: asyncio.Task[None]) -> None:
    """An error that nobody waits for comes again with whatever is sent or received next."""
    if not listening.cancelled():
        listening.exception()

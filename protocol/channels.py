"""The channels that a node has open: one per address, opened when it is first called, dropped when it proves false."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import grpc

from common.errors import DeadlineError
from protocol.call_errors import rebuilt_error
from protocol.security import NotConnectedError

if TYPE_CHECKING:
    from protocol.endpoints import Address
    from protocol.security import Caller

OPEN_TIMEOUT_S = 10.0
CLOSE_GRACE_S = 0.5
UNUSED_S = 300.0
"""A channel that nobody has asked for in so long is closed: peers leave, and come back under other addresses."""


class Channels:
    """Belongs to the event loop."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._opening: dict[Address, asyncio.Task[grpc.aio.Channel]] = {}
        self._used_s: dict[Address, float] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def get(self, address: Address, timeout_s: float) -> grpc.aio.Channel:
        """The channel to `address`; raises what `Caller.open` raises, DeadlineError after `timeout_s`."""
        opening = self._opening.get(address) or self._open(address)
        self._used_s[address] = asyncio.get_running_loop().time()
        try:
            # Others may wait for the same channel: who gives up leaves it to them.
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(opening)
        except TimeoutError:
            raise DeadlineError(f"no connection to {address.endpoint} in {timeout_s:.1f} s") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not opening.cancelled() or (task is not None and task.cancelling()):
                raise
            # Another call to the peer has failed and dropped the channel; this caller was not told to stop.
            raise NotConnectedError(f"the connection to {address.endpoint} was given up while it was opened") from None

    async def call(self, address: Address, path: str, raw: bytes, timeout_s: float) -> bytes:
        """The answer to one signed call of `path`, such as /package.Service/Method, unread.

        Raises the peer's own error, or what `get` raises; DeadlineError after `timeout_s`, in seconds.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        channel = await self.get(address, timeout_s)
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        left_s = max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            return await call(raw, timeout=left_s, metadata=self._caller.metadata(address, path))
        except grpc.aio.AioRpcError as error:
            rebuilt = rebuilt_error(error.code(), error.details(), error.trailing_metadata())
            if isinstance(rebuilt, NotConnectedError):
                # A peer that was started again has another certificate: the next call fetches it.
                self.drop(address)
            raise rebuilt from None

    def drop(self, address: Address) -> None:
        """Close the channel to `address`, if there is one: the peer may have a new certificate."""
        opening = self._opening.pop(address, None)
        self._used_s.pop(address, None)
        if opening is not None:
            closing = asyncio.create_task(_close(opening), name="close channel")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _open(self, address: Address) -> asyncio.Task[grpc.aio.Channel]:
        self._drop_unused()
        opening = asyncio.create_task(self._caller.open(address, OPEN_TIMEOUT_S), name="open channel")
        self._opening[address] = opening
        opening.add_done_callback(partial(self._opened, address))
        return opening

    def _drop_unused(self) -> None:
        before_s = asyncio.get_running_loop().time() - UNUSED_S
        for address in [address for address, used_s in self._used_s.items() if used_s < before_s]:
            self.drop(address)

    def _opened(self, address: Address, opening: asyncio.Task[grpc.aio.Channel]) -> None:
        failed = opening.cancelled() or opening.exception() is not None
        if failed and self._opening.get(address) is opening:
            del self._opening[address]

    async def close(self) -> None:
        """Close every channel; calls in flight are cancelled."""
        for address in list(self._opening):
            self.drop(address)
        await asyncio.gather(*self._closing, return_exceptions=True)


async def _close(opening: asyncio.Task[grpc.aio.Channel]) -> None:
    if not opening.done():
        opening.cancel()
        return
    if not opening.cancelled() and opening.exception() is None:
        await opening.result().close(CLOSE_GRACE_S)

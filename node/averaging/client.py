"""gRPC calls to other replicas' holders: exchanges that this node begins, and downloads. On the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc

from common.errors import KilohiveError, OverloadedError, UnavailableError
from common.tasks import within
from node.averaging.download import Download
from node.averaging.pairing import Pairing, Tally
from node.averaging.partial import PartialReplica
from node.averaging.service import SERVICE_NAME
from node.limits.limits import MIN_BYTES_PER_S
from node.limits.rate_limits import RateLimits
from node.rpc.message_stream import ALIVE, ALIVE_PER_SILENCE, Inbox, Wire
from protocol.call_errors import rebuilt_error
from protocol.channels import CLOSE_GRACE_S, OPEN_TIMEOUT_S
from protocol.limits import MAX_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from node.averaging.exchange import ExchangeConfig, ExchangeResult
    from node.averaging.replica_set import ReplicaSet
    from node.model.replica_state import ReplicaState, TensorSchema
    from protocol.endpoints import Address
    from protocol.manifest import BlockId
    from protocol.security import Caller

_CUT_IN_A_MESSAGE = "Internal error from Core"
"""What grpc.aio makes of the status when the call ends while a message is on its way out."""


class AveragingClient:
    """Dials other nodes by address, one exchange at a time. `wire_bytes` counts messages' bytes, both ways."""

    def __init__(
        self, replicas: ReplicaSet, config: ExchangeConfig, caller: Caller, rate_limits: RateLimits | None = None
    ) -> None:
        self._replicas, self._config, self._caller = replicas, config, caller
        self._rate_limits = rate_limits or RateLimits()
        self._open: set[grpc.aio.Channel] = set()
        self._dialling = False
        self.wire_bytes = 0

    async def exchange(self, partner: Address, block_ids: Sequence[BlockId], timeout_s: float) -> ExchangeResult:
        """One exchange with `partner` over those of the blocks that both have, in this order.

        It may take `timeout_s` and what the largest block takes at the lowest rate that an owner may set. Once the
        partner has answered the offer, what breaks the exchange is told in the result, beside what was done.

        Raises:
            KilohiveError: nothing was exchanged: the partner cannot be reached, refuses, or is of another run.
            OverloadedError: the partner answers another exchange, or this node has dialled one already.
        """
        if self._dialling:
            raise OverloadedError("this node has begun another exchange")
        self._dialling = True
        try:
            # What was taken before is paid for first: calls are not to wait for averaging.
            await asyncio.sleep(min(self._rate_limits.owed_s(), timeout_s))
            return await self._exchange(partner, block_ids, await self._limit_s(block_ids, timeout_s))
        finally:
            self._dialling = False

    async def download(
        self,
        source: Address,
        block_id: BlockId,
        wanted: Sequence[TensorSchema] | PartialReplica,
        timeout_s: float,
        *,
        params_only: bool = False,
        tell: Callable[[int], None] | None = None,
    ) -> ReplicaState:
        """A peer's replica, checked against `wanted`; `learnt_R` is zero. Waits while the peer has others to serve.

        With `params_only` there are no moments. Of a partial replica only the pieces come that it lacks, and what comes
        stays in it, also when this raises. `tell` is called with the bytes that have come so far. `timeout_s` is for
        all but the bytes, which may take what they take at the slowest rate that is borne.

        Raises:
            KilohiveError: the peer's error, UnavailableError, DeadlineError, InvalidInputError for bytes that do not
                fit.
        """
        if not isinstance(wanted, PartialReplica):
            wanted = PartialReplica(block_id, wanted, params_only=params_only)
        download = Download(wanted, source.peer_id, self._config)
        limit_s = timeout_s + self._config.bytes_timeout_s(wanted.n_bytes - wanted.taken_bytes)
        async with within(limit_s, f"the download of block {block_id}"):
            while True:
                try:
                    return await self._download(source, download, tell)
                except OverloadedError as error:
                    await asyncio.sleep(error.retry_after_s)

    async def _limit_s(self, block_ids: Sequence[BlockId], timeout_s: float) -> float:
        async with within(self._config.offer_timeout_s, "the schemas of the blocks"):
            await self._replicas.schema_hashes(block_ids)
        largest = max((self._replicas.n_bytes(block_id) for block_id in block_ids), default=0)
        return min(MAX_DEADLINE_S, timeout_s + 2 * largest / MIN_BYTES_PER_S)

    async def close(self) -> None:
        """Close every channel; calls in flight end with UnavailableError."""
        await asyncio.gather(*(channel.close(CLOSE_GRACE_S) for channel in self._open))

    async def _exchange(self, partner: Address, block_ids: Sequence[BlockId], timeout_s: float) -> ExchangeResult:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        tally = Tally(partner=partner.peer_id, dialled=True)
        async with self._channel(partner, timeout_s) as channel:
            path = f"/{SERVICE_NAME}/Exchange"
            method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
            call = method(timeout=timeout_s, metadata=self._caller.metadata(partner, path))
            stream = _ClientStream(call)
            async with Wire(stream, self._config.silence_s, self._rate_limits) as wire:
                try:
                    async with within(timeout_s, "the exchange"):
                        await Pairing(wire, self._replicas, self._config, tally).dial(block_ids)
                        if tally.agreed:
                            await stream.done()
                            await wire.receive_or_end()
                except KilohiveError as error:
                    if not tally.agreed:
                        raise
                    tally.problem = str(error)
                finally:
                    self.wire_bytes += wire.n_bytes
        return tally.result(wire.n_bytes, loop.time() - started_s)

    async def _download(self, source: Address, download: Download, tell: Callable[[int], None] | None) -> ReplicaState:
        async with self._channel(source, OPEN_TIMEOUT_S) as channel:
            path = f"/{SERVICE_NAME}/Download"
            method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
            call = method(metadata=self._caller.metadata(source, path))
            side = _DownloadingSide(_ClientStream(call), self._config.silence_s, self._rate_limits)
            try:
                await side.stream.send(download.request())
                return await download.receive(side, tell)
            finally:
                self.wire_bytes += side.inbox.n_bytes

    @asynccontextmanager
    async def _channel(self, address: Address, timeout_s: float) -> AsyncIterator[grpc.aio.Channel]:
        """A connection for one call: calls are seconds apart, and partners come and go."""
        channel = await self._caller.open(address, timeout_s)
        self._open.add(channel)
        try:
            yield channel
        finally:
            self._open.discard(channel)
            # Without grace: what is still running is cancelled.
            await channel.close()


class _ClientStream:
    """The calling end of a gRPC stream."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        self._call = call

    async def send(self, raw: bytes) -> None:
        """Raises the partner's error if that is known."""
        async with self._errors():
            await self._call.write(raw)

    async def done(self) -> None:
        """Send no more."""
        async with self._errors():
            await self._call.done_writing()

    async def receive(self) -> bytes | None:
        """None at the end of a call that went well."""
        async with self._errors():
            raw = await self._call.read()
            return raw if isinstance(raw, bytes) else None

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise _rebuilt(error.code(), error.details(), error.trailing_metadata()) from None
        except asyncio.InvalidStateError:
            # The call had ended before this message: its status says why.
            call = self._call
            raise _rebuilt(await call.code(), await call.details(), await call.trailing_metadata()) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not this task is cancelled but the call, by `close`.
            raise UnavailableError("this node closed the call") from None


class _DownloadingSide:
    """The calling side of a download."""

    def __init__(self, stream: _ClientStream, silence_s: float, rate_limits: RateLimits) -> None:
        self.stream, self.inbox = stream, Inbox(stream, rate_limits)
        self._every_s = silence_s / ALIVE_PER_SILENCE

    @asynccontextmanager
    async def saying_alive(self) -> AsyncIterator[None]:
        stopping = asyncio.Event()
        saying = asyncio.create_task(self._say_alive(stopping), name="say that this node is alive")
        try:
            yield
            stopping.set()
            await saying  # to cancel a write would cancel the call
        finally:
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)

    async def _say_alive(self, stopping: asyncio.Event) -> None:
        # Why the call has ended is told by what is received.
        with contextlib.suppress(KilohiveError):
            while not stopping.is_set():
                await self.stream.send(ALIVE)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._every_s):
                        await stopping.wait()

    async def done(self) -> None:
        await self.stream.done()


def _rebuilt(code: grpc.StatusCode, details: str | None, trailing: grpc.aio.Metadata | None) -> KilohiveError:
    if code is grpc.StatusCode.OK or details == _CUT_IN_A_MESSAGE:
        return UnavailableError("the partner ended the call")
    return rebuilt_error(code, details, trailing)

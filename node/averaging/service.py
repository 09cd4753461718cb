"""The gRPC service that answers exchanges and sends downloads, on a host or a trainer. Runs on the event loop."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc

from common.errors import InvalidInputError, KilohiveError, NotHostedError, OverloadedError, UnknownRunError
from common.tasks import within
from node.averaging.download import send_state
from node.averaging.pairing import Pairing, Tally, receive_offer
from node.limits.rate_limits import RateLimits
from node.model.replica_state import ReplicaState
from node.rpc.handlers import ServerStream, streaming, timeout_s
from node.rpc.message_stream import Wire
from protocol import averaging_pb2 as pb
from protocol.call_signature import caller_of
from protocol.manifest import parse_block_id
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from node.averaging.exchange import ExchangeConfig, ExchangeResult
    from node.averaging.replica_set import ReplicaSet
    from protocol.manifest import BlockId

    Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Averaging"].full_name
MAX_ANSWERED = 1
MAX_DOWNLOADS = 2
"""The most downloads at once: each holds a copy of a block."""

RETRY_AFTER_S = 0.2
MAX_DEBT_S = 1.0
"""A node whose owner limits it begins nothing that can wait while it owes more: calls come first."""


class AveragingService:
    """Exchange and Download over one node's replicas.

    `on_result` hears of every exchange that got as far as an answered offer. `stored` reads the checkpoint of a block
    that is not held here, None if there is none; it is called in a thread.
    """

    def __init__(
        self,
        replicas: ReplicaSet,
        config: ExchangeConfig,
        on_result: Callable[[ExchangeResult], None],
        *,
        stored: Callable[[BlockId], ReplicaState | None] | None = None,
        rate_limits: RateLimits | None = None,
    ) -> None:
        self._replicas, self._config, self._rate_limits = replicas, config, rate_limits or RateLimits()
        self._on_result, self._stored = on_result, stored
        self._running = {"exchange": 0, "download": 0}

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Exchange": grpc.stream_stream_rpc_method_handler(streaming(self._exchange, "Exchange")),
            "Download": grpc.stream_stream_rpc_method_handler(streaming(self._download, "Download")),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def _exchange(self, _: object, context: Context) -> None:
        async with Wire(ServerStream(context), self._config.silence_s, self._rate_limits) as wire:
            # The offer is read before a refusal: a call that ends while the dialler still sends loses the status, in
            # gRPC. Nor can a peer that dials and then says nothing keep others out.
            raw_offer = await receive_offer(wire, self._config)
            if raw_offer is None:
                return
            with self._slot("exchange", MAX_ANSWERED):
                await self._answer(wire, raw_offer, context)

    async def _answer(self, wire: Wire, raw_offer: bytes, context: Context) -> None:
        tally = Tally(partner="", dialled=False)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        caller = caller_of(context.invocation_metadata() or ())
        try:
            async with within(timeout_s(context), "the exchange"):
                await Pairing(wire, self._replicas, self._config, tally).answer(raw_offer, caller)
        except KilohiveError as error:
            tally.problem = str(error)
            raise
        except asyncio.CancelledError:
            tally.problem = "the dialler broke off"
            raise
        finally:
            if tally.agreed:
                self._on_result(tally.result(wire.n_bytes, loop.time() - started_s))

    async def _download(self, _: object, context: Context) -> None:
        async with Wire(ServerStream(context), self._config.silence_s, self._rate_limits) as wire:
            await self._send_copy(wire)

    async def _send_copy(self, wire: Wire) -> None:
        async with within(self._config.offer_timeout_s, "the request"):
            request = parse_message(pb.DownloadRequest, await wire.receive())
        block_id = self._checked_block(request)
        with self._slot("download", MAX_DOWNLOADS):
            async with within(self._config.block_timeout_s, f"the copy of block {block_id}"):
                state = await self._copy_of(block_id)
            async with within(self._config.transfer_timeout_s(state), f"the download of block {block_id}"):
                await send_state(wire, block_id, state, self._config, request)

    async def _copy_of(self, block_id: BlockId) -> ReplicaState:
        replica = self._replicas.get(block_id)
        if replica is not None:
            return await asyncio.wrap_future(replica.look(ReplicaState.copy))
        state = await asyncio.to_thread(self._stored, block_id) if self._stored else None
        if state is None:
            raise NotHostedError("block", f"{block_id} is neither hosted nor stored here")
        return state

    def _checked_block(self, request: pb.DownloadRequest) -> BlockId:
        if request.run_id != self._config.run_id:
            raise UnknownRunError("run_id", f"is {request.run_id[:100]!r}, this node serves {self._config.run_id!r}")
        try:
            return parse_block_id(request.block)
        except ValueError as error:
            raise InvalidInputError("block", str(error)) from None

    @contextmanager
    def _slot(self, what: str, most: int) -> Iterator[None]:
        if (owed_s := self._rate_limits.owed_s()) > MAX_DEBT_S:
            raise OverloadedError(f"this node's owner limits it: no {what} for now", owed_s)
        if self._running[what] >= most:
            raise OverloadedError(f"this node already has {most} {what}(s) to answer", RETRY_AFTER_S)
        self._running[what] += 1
        try:
            yield
        finally:
            self._running[what] -= 1

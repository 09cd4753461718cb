"""The gRPC service with which a trainer takes offers and tells how far they are. Runs on the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from common.errors import OverloadedError, UnavailableError
from common.tasks import within
from dht.view import evaluators_named
from node.model.expert_file import read_expert
from node.rpc.handlers import CallCounts, timeout_s, unary_in_context
from node.rpc.message_stream import Inbox
from node.rpc.upload import UPLOAD_S, offered_in, receive_begin, receive_file, upload_handler
from protocol import contribution_pb2 as pb
from protocol.call_signature import caller_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dht.view import PeerInfo
    from node.rpc.handlers import ServerStream
    from node.trainer.evaluator.offers import OfferQueue
    from protocol.manifest import Manifest

    Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Evaluation"].full_name
MAX_UPLOADS = 2
"""The most uploads at once."""

RETRY_AFTER_S = 1.0


class EvaluationService:
    """Offer and Ask over one trainer's queue; `peers` are those that are live now."""

    def __init__(
        self, manifest: Manifest, peer_id: str, queue: OfferQueue, peers: Callable[[], Sequence[PeerInfo]]
    ) -> None:
        self._manifest, self._peer_id, self._queue, self._peers = manifest, peer_id, queue, peers
        self._uploads = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Offer": grpc.stream_unary_rpc_method_handler(upload_handler(self._offer, "Offer")),
            "Ask": grpc.unary_unary_rpc_method_handler(unary_in_context(pb.AskRequest, self._ask, CallCounts())),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def _offer(self, stream: ServerStream, context: Context) -> pb.OfferStatus:
        if self._uploads >= MAX_UPLOADS:
            raise OverloadedError(f"this trainer already receives {MAX_UPLOADS} offers", RETRY_AFTER_S)
        self._uploads += 1
        try:
            async with within(min(timeout_s(context), UPLOAD_S), "the offer"):
                return await self._received(Inbox(stream), caller_of(context.invocation_metadata() or ()) or "")
        finally:
            self._uploads -= 1

    async def _received(self, inbox: Inbox, caller: str) -> pb.OfferStatus:
        begin = await receive_begin(inbox)
        offered = offered_in(begin, self._manifest)
        if self._peer_id not in evaluators_named(self._peers(), self._manifest.owner):
            raise UnavailableError("this trainer evaluates no offers: the run's owner does not name it now")
        if (known := self._queue.known(caller, offered)) is not None:
            return self._queue.status(known)
        self._queue.check_capacity(caller)
        data = await receive_file(inbox, begin)
        weights = await asyncio.to_thread(read_expert, data, self._manifest)
        return self._queue.status(self._queue.add(caller, offered, weights))

    async def _ask(self, request: pb.AskRequest, context: Context) -> pb.OfferStatus:
        caller = caller_of(context.invocation_metadata() or ()) or ""
        return self._queue.status(self._queue.ask(caller, offered_in(request, self._manifest)))

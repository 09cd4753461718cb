"""The gRPC service about receipts, on hosts and trainers: anybody collects them; a host signs them too. On the loop."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc

from common.errors import StorageError, UnauthenticatedError, UnavailableError, UnknownRunError
from common.seldom import Seldom
from common.tasks import within
from node.credit.call_quota import CallQuota
from node.rpc.handlers import CallCounts, timeout_s, unary_in_context
from protocol import receipts_pb2 as pb
from protocol.call_signature import caller_of
from protocol.profile import sign_profile
from protocol.receipts import CREDIT_SERVICE

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.credit.store import ReceiptStore
    from protocol.identity import Identity
    from protocol.profile import Profile

    Context = grpc.aio.ServicerContext[Any, Any]

R = TypeVar("R")
logger = logging.getLogger(__name__)
MAX_CALL_S = 10.0
"""The longest that a call may take, whatever its caller allows."""


class Countersigner(Protocol):
    """What a host answers trainers. Its methods block for milliseconds: they are called off the event loop."""

    def countersign(self, claim: pb.SignedReceipt, caller: str) -> pb.CountersignResponse:
        """The host's signature; raises a KilohiveError for a claim that it does not agree with."""

    def counted(self, caller: str) -> pb.CountedResponse:
        """What it has counted for the caller, and not signed for."""


class CreditService:
    """Collect over one node's store; with a countersigner Countersign and Counted too."""

    def __init__(
        self,
        run_id: str,
        store: ReceiptStore,
        identity: Identity,
        profile: Profile | None,
        countersigner: Countersigner | None = None,
    ) -> None:
        self._run_id, self._store, self._countersigner = run_id, store, countersigner
        self._profile = sign_profile(identity, profile) if profile is not None else None
        self._quota, self._told = CallQuota(), Seldom()

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        calls: dict[str, Any] = {"Collect": unary_in_context(pb.CollectRequest, self._collect, CallCounts())}
        if self._countersigner is not None:
            calls["Countersign"] = unary_in_context(pb.SignedReceipt, self._countersign, CallCounts())
            calls["Counted"] = unary_in_context(pb.CountedRequest, self._counted, CallCounts())
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(call) for name, call in calls.items()
        }
        return grpc.method_handlers_generic_handler(CREDIT_SERVICE, methods)

    async def _collect(self, request: pb.CollectRequest, context: Context) -> pb.ReceiptPage:
        self._check_run(request.run_id)
        page = await self._in_thread(context, lambda: self._store.page(request))
        if self._profile is not None:
            page.profile.CopyFrom(self._profile)
        return page

    async def _countersign(self, claim: pb.SignedReceipt, context: Context) -> pb.CountersignResponse:
        countersigner, caller = self._signing(context)
        return await self._in_thread(context, lambda: countersigner.countersign(claim, caller))

    async def _counted(self, request: pb.CountedRequest, context: Context) -> pb.CountedResponse:
        self._check_run(request.run_id)
        countersigner, caller = self._signing(context)
        return await self._in_thread(context, lambda: countersigner.counted(caller))

    def _signing(self, context: Context) -> tuple[Countersigner, str]:
        caller = _caller(context)
        if self._countersigner is None or not caller:
            raise UnauthenticatedError("receipts are for callers that sign their calls")
        return self._countersigner, caller

    async def _in_thread(self, context: Context, work: Callable[[], R]) -> R:
        with self._quota.one_call(_caller(context)):
            async with within(min(timeout_s(context), MAX_CALL_S), "the call about receipts"):
                try:
                    return await asyncio.to_thread(work)
                except StorageError as error:
                    if self._told.due("storage"):
                        logger.warning("Receipts cannot be kept or read: %s", error)
                    raise UnavailableError("this node cannot keep or read receipts now: try again later") from None

    def _check_run(self, run_id: str) -> None:
        if run_id != self._run_id:
            raise UnknownRunError("run_id", f"is {run_id[:100]!r}, this node serves {self._run_id!r}")


def _caller(context: Context) -> str:
    """Return who calls; empty where calls are not signed."""
    return caller_of(context.invocation_metadata() or ()) or ""

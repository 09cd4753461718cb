"""Lets no call in that its caller has not signed for this node: health and reflection too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from common.errors import KilohiveError
from node.rpc.handlers import abort_with

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from protocol.call_signature import CallChecker

    Handler = grpc.RpcMethodHandler[Any, Any]


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """The interceptor in front of every handler that checks who calls."""

    def __init__(self, checker: CallChecker) -> None:
        self._checker = checker

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The call's handler, or one that refuses it before a byte of the request is read."""
        try:
            self._checker.check(details.method, details.invocation_metadata)
        except KilohiveError as error:
            return _refusal(error)
        return await continuation(details)


def _refusal(error: KilohiveError) -> Handler:
    async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort_with(error, context)

    # Whatever kind of call it was: one that is refused looks alike on the wire.
    return grpc.stream_stream_rpc_method_handler(refuse)

"""In front of every unary handler: calls are counted against the owner's limits, slowed down, and refused if need be.

A call that came is answered after a rest, so that the caller's own waiting keeps the rate; one that would be answered
too late is told when to try again. Streams are counted message by message, in `node/rpc/message_stream.py`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import grpc

from common.errors import OverloadedError
from node.limits.rate_limits import CALL_BYTES
from node.rpc.handlers import abort_with
from protocol.limits import MAX_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from common.errors import KilohiveError
    from node.limits.rate_limits import RateLimits

    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
    Unary = Callable[[bytes, Context], Awaitable[bytes]]

REST_SHARE = 0.5
"""The largest share of the time that a caller still waits which may pass before its call is begun."""


class RateLimitInterceptor(grpc.aio.ServerInterceptor):
    """`refusal` says why no call is taken now, None if calls are; `max_calls` are taken at once, streams among them."""

    def __init__(
        self, rate_limits: RateLimits, refusal: Callable[[], KilohiveError | None], max_calls: int | None = None
    ) -> None:
        self._rate_limits, self._refusal, self.max_calls = rate_limits, refusal, max_calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The call's handler with this in front of it; health, reflection and streams as they are."""
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None or handler.request_deserializer:
            return handler
        return grpc.unary_unary_rpc_method_handler(self._paced(cast("Unary", handler.unary_unary)))

    def _paced(self, call: Unary) -> Unary:
        async def handle(raw: bytes, context: Context) -> bytes:
            rest_s = self._rate_limits.received(len(raw) + CALL_BYTES)
            left_s = _time_left(context)
            failure = self._refusal()
            if failure is None and rest_s > left_s * REST_SHARE:
                failure = OverloadedError(f"this host's owner limits it: it rests for {rest_s:.1f} s", rest_s)
            if failure is not None:
                await abort_with(failure, context)
            await asyncio.sleep(rest_s)
            answer = await call(raw, context)
            await asyncio.sleep(min(self._rate_limits.sent(len(answer) + CALL_BYTES), _time_left(context) * REST_SHARE))
            return answer

        return handle


def _time_left(context: Context) -> float:
    left_s = context.time_remaining()
    return MAX_DEADLINE_S if left_s is None else max(0.0, min(left_s, MAX_DEADLINE_S))

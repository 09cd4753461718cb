"""What every gRPC handler of a node does alike: parse untrusted bytes, bound the deadline, turn errors into statuses.

A unary handler is built whole by `unary` or `unary_in_context`, a streaming one by `streaming`. They abort after their
`except` block and not in it, so that no handler of their own catches the AbortError that gRPC raises.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from google.protobuf.message import Message

from common.errors import DeadlineError, KilohiveError
from protocol.limits import MAX_DEADLINE_S
from protocol.parsing import parse_message
from protocol.status import MAX_MESSAGE_CHARS, status_of, trailing_metadata_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res")
logger = logging.getLogger(__name__)


@dataclass
class CallCounts:
    """Calls of one service since it started."""

    ok: int = 0
    refused: int = 0


def unary(
    request_type: type[Req], call: Callable[[Req, float], Awaitable[Message]], counts: CallCounts
) -> Callable[[bytes, Context], Awaitable[bytes]]:
    """Handler of raw bytes around `call(request, timeout_s)`, which raises a KilohiveError for anything that is off."""

    async def in_time(request: Req, context: Context) -> Message:
        return await call(request, timeout_s(context))

    return unary_in_context(request_type, in_time, counts)


def unary_in_context(
    request_type: type[Req], call: Callable[[Req, Context], Awaitable[Message]], counts: CallCounts
) -> Callable[[bytes, Context], Awaitable[bytes]]:
    """Like `unary`, around `call(request, context)`: for calls that depend on who makes them."""

    async def handle(raw: bytes, context: Context) -> bytes:
        try:
            answer = await call(parse_message(request_type, raw), context)
            counts.ok += 1
            return answer.SerializeToString()
        except Exception as error:  # noqa: BLE001 - task boundary: a bug of ours must not end the node
            failure = failure_of(error, request_type.__name__)
        counts.refused += 1
        return await abort_with(failure, context)

    return handle


class ServerStream:
    """The answering end of a gRPC stream."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def send(self, raw: bytes) -> None:
        """Send one message."""
        await self._context.write(raw)

    async def receive(self) -> bytes | None:
        """The next message, None when the caller sends no more."""
        raw = await self._context.read()
        return raw if isinstance(raw, bytes) else None


def streaming(call: Callable[[Any, Context], Awaitable[Res]], what: str) -> Callable[[Any, Context], Awaitable[Res]]:
    """Handler of a call that reads or writes a ServerStream, which raises a KilohiveError for anything that is off."""

    async def handle(request: object, context: Context) -> Res:
        try:
            return await call(request, context)
        except Exception as error:  # noqa: BLE001 - task boundary: a bug of ours must not end the node
            failure = failure_of(error, what)
        return await abort_with(failure, context)

    return handle


def timeout_s(context: Context) -> float:
    """Seconds that the caller still waits, at most MAX_DEADLINE_S; DeadlineError when they are over."""
    remaining_s = context.time_remaining()
    bounded_s = MAX_DEADLINE_S if remaining_s is None else min(remaining_s, MAX_DEADLINE_S)
    if bounded_s <= 0:
        raise DeadlineError("the deadline had passed when the request arrived")
    return bounded_s


def failure_of(error: Exception, what: str) -> KilohiveError:
    """What the caller is told: an error raised on purpose as it is; a bug is logged, and only its type is named."""
    if isinstance(error, KilohiveError):
        return error
    logger.error("The call %s failed", what, exc_info=error)
    return KilohiveError(f"the node failed: {type(error).__name__}")


async def abort_with(failure: KilohiveError, context: Context) -> NoReturn:
    """End the call with the status, sentence and metadata from which the caller rebuilds `failure`."""
    await context.abort(status_of(failure), str(failure)[:MAX_MESSAGE_CHARS], trailing_metadata_of(failure))
    raise failure

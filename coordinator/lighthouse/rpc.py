"""Calls of hivemind's DHT over libp2p's streams, out and in: one stream for each, a deadline for each."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import trio
from google.protobuf.message import Message

from common.errors import KilohiveError, UnavailableError
from coordinator.lighthouse import wire
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from coordinator.lighthouse.streams import TrioStream
    from coordinator.lighthouse.transport import TrioTransport

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

CALL_TIMEOUT_S = 3.0
"""How long one call to one peer may take, the connection included."""

SERVE_TIMEOUT_S = 10.0
"""How long a peer may take to send its call, and to take the answer."""

PREFIX = "DHTProtocol."


class DhtCalls:
    """What is called and served, over one transport. `served` counts calls that were answered, by kind."""

    def __init__(self, transport: TrioTransport) -> None:
        self._transport = transport
        self.served: Counter[str] = Counter()
        self.refused = 0

    async def call(self, peer: bytes, kind: str, request: Message, answer: type[R]) -> R:
        """Ask a peer, such as for "rpc_ping"; raises UnavailableError or InvalidInputError."""
        with trio.move_on_after(CALL_TIMEOUT_S):
            stream = await self._transport.open_stream(peer, PREFIX + kind)
            try:
                call_id = os.urandom(wire.CALL_ID_BYTES)
                await stream.write(wire.framed(wire.request_frame(call_id, peer, PREFIX + kind, request)))
                return wire.answer_in(await wire.read_frame(stream.read), call_id, answer)
            finally:
                await stream.reset()  # the answer is here or is not wanted any more
        raise UnavailableError(f"{kind}: no answer in {CALL_TIMEOUT_S:g} s")

    def serve(self, kind: str, request: type[Q], answer: Callable[[Q, bytes], Awaitable[Message]]) -> None:
        """Answer calls of a kind; `answer` gets the request and the peer that has proven to be its sender."""
        self._transport.handle(PREFIX + kind, partial(self._serve, kind, request, answer))

    async def _serve(
        self, kind: str, request: type[Q], answer: Callable[[Q, bytes], Awaitable[Message]], stream: TrioStream
    ) -> None:
        with trio.move_on_after(SERVE_TIMEOUT_S):
            try:
                call = wire.request_in(await wire.read_frame(stream.read), PREFIX + kind)
            except KilohiveError as error:
                self.refused += 1
                raise UnavailableError(f"not a call: {error}") from error
            try:
                response = await answer(parse_message(request, call.body, "request"), stream.peer)
                raw = wire.framed(wire.answer_frame(call.call_id, response))
                self.served[kind] += 1
            except KilohiveError as error:
                self.refused += 1
                raw = wire.framed(wire.refusal_frame(call.call_id, error))
            await stream.write(raw)

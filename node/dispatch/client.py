"""gRPC calls to hosts: one channel per endpoint, a deadline on every call, typed errors back. On the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from protocol import expert_pb2 as pb
from protocol.errors import InvalidInputError, KilohiveError, OverloadedError, UnavailableError, error_from_status
from protocol.limits import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

Res = TypeVar("Res", bound=Message)

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A host that comes back on the same endpoint is tried again soon.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),
)
CLOSE_GRACE_S = 0.5

_NOT_CONNECTED = "failed to connect to all addresses"
"""How gRPC's status begins when a call found no connection to leave on."""


class NotConnectedError(UnavailableError):
    """No connection was made: the peer has seen nothing of the call."""


def is_lost(error: KilohiveError) -> bool:
    """Whether a call got lost on its way: the peer was there, and may or may not have had it."""
    return isinstance(error, UnavailableError) and not isinstance(error, NotConnectedError)


class ExpertClient:
    """Calls hosts by endpoint. `wire_bytes` counts messages' bytes, both ways."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.wire_bytes = 0

    async def forward(
        self, endpoint: str, request: pb.ForwardRequest, timeout_s: float, *, patient: bool = True
    ) -> pb.ForwardResponse:
        """Forward at `endpoint`; raises the host's error, or UnavailableError, DeadlineError.

        A patient call that finds the host overloaded is repeated after the host's own delay while time is left.
        """
        return await self._call(endpoint, request, pb.ForwardResponse, timeout_s, patient=patient)

    async def backward(
        self, endpoint: str, request: pb.BackwardRequest, timeout_s: float, *, patient: bool = True
    ) -> pb.BackwardResponse:
        """Backward at `endpoint`; waits and raises like `forward`."""
        return await self._call(endpoint, request, pb.BackwardResponse, timeout_s, patient=patient)

    async def describe(self, endpoint: str, request: pb.DescribeRequest, timeout_s: float) -> pb.DescribeResponse:
        """What the host at `endpoint` holds; waits and raises like a patient `forward`."""
        return await self._call(endpoint, request, pb.DescribeResponse, timeout_s, patient=True)

    async def close(self) -> None:
        """Close every channel; calls in flight are cancelled."""
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close(CLOSE_GRACE_S) for channel in channels))

    async def forget(self, endpoint: str) -> None:
        """Close the channel to `endpoint`, if there is one."""
        channel = self._channels.pop(endpoint, None)
        if channel is not None:
            await channel.close(CLOSE_GRACE_S)

    async def _call(
        self, endpoint: str, request: Message, response_type: type[Res], timeout_s: float, *, patient: bool
    ) -> Res:
        # A method is named like its request.
        method, raw = request.DESCRIPTOR.name.removesuffix("Request"), request.SerializeToString()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            left_s = deadline - asyncio.get_running_loop().time()
            try:
                return _parsed(response_type, await self._send(endpoint, method, raw, left_s))
            except OverloadedError as error:
                if not patient or left_s <= error.retry_after_s:
                    raise
                await asyncio.sleep(error.retry_after_s)

    async def _send(self, endpoint: str, method: str, raw: bytes, timeout_s: float) -> bytes:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        call = self._channel(endpoint).unary_unary(f"/{pb.DESCRIPTOR.package}.Expert/{method}")
        try:
            answer: bytes = await call(raw, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise rebuilt_error(error.code(), error.details(), error.trailing_metadata()) from None
        self.wire_bytes += len(raw) + len(answer)
        return answer

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        if endpoint not in self._channels:
            self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=OPTIONS)
        return self._channels[endpoint]


def rebuilt_error(code: grpc.StatusCode, details: str | None, trailing: grpc.aio.Metadata | None) -> KilohiveError:
    """The error that a call's status tells: the peer's own by its type, NotConnectedError if the call never left."""
    metadata: Mapping[str, str] = {k: v for k, v in trailing or () if isinstance(v, str)}
    rebuilt = error_from_status(code, details or "", metadata)
    if isinstance(rebuilt, UnavailableError) and str(rebuilt).startswith(_NOT_CONNECTED):
        return NotConnectedError(str(rebuilt))
    return rebuilt


def _parsed(response_type: type[Res], raw: bytes) -> Res:
    response = response_type()
    try:
        response.ParseFromString(raw)
    except DecodeError:
        raise InvalidInputError("response", f"{len(raw)} bytes are not a whole {response_type.__name__}") from None
    return response

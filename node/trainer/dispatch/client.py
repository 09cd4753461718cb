"""gRPC calls to hosts: one channel per peer, a deadline on every call, typed errors back. On the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import Message

from common.errors import InternalError, InvalidInputError, OverloadedError
from node.rpc.call_errors import rebuilt_error
from node.rpc.channels import Channels
from node.rpc.security import NotConnectedError
from protocol import expert_pb2 as pb
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from node.rpc.security import Caller
    from protocol.endpoints import Address

Res = TypeVar("Res", bound=Message)


class ExpertClient:
    """Calls hosts by address. `wire_bytes` counts messages' bytes, both ways."""

    def __init__(self, caller: Caller) -> None:
        self._caller, self._channels = caller, Channels(caller)
        self.wire_bytes = 0

    async def forward(
        self, address: Address, request: pb.ForwardRequest, timeout_s: float, *, patient: bool = True
    ) -> pb.ForwardResponse:
        """Forward at `address`; raises the host's error, or UnavailableError, DeadlineError.

        A patient call that finds the host overloaded is repeated after the host's own delay while time is left.
        """
        return await self._call(address, request, pb.ForwardResponse, timeout_s, patient=patient)

    async def backward(
        self, address: Address, request: pb.BackwardRequest, timeout_s: float, *, patient: bool = True
    ) -> pb.BackwardResponse:
        """Backward at `address`; waits and raises like `forward`."""
        return await self._call(address, request, pb.BackwardResponse, timeout_s, patient=patient)

    async def describe(self, address: Address, request: pb.DescribeRequest, timeout_s: float) -> pb.DescribeResponse:
        """What the host at `address` holds; waits and raises like a patient `forward`."""
        return await self._call(address, request, pb.DescribeResponse, timeout_s, patient=True)

    async def close(self) -> None:
        """Close every channel; calls in flight are cancelled."""
        await self._channels.close()

    async def _call(
        self, address: Address, request: Message, response_type: type[Res], timeout_s: float, *, patient: bool
    ) -> Res:
        # A method is named like its request.
        method, raw = request.DESCRIPTOR.name.removesuffix("Request"), request.SerializeToString()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            left_s = deadline - asyncio.get_running_loop().time()
            try:
                answer = await self._send(address, method, raw, left_s)
            except OverloadedError as error:
                if not patient or left_s <= error.retry_after_s:
                    raise
                await asyncio.sleep(error.retry_after_s)
                continue
            try:
                return parse_message(response_type, answer, "response")
            except InvalidInputError as error:  # told apart from one that the peer raises about the request
                raise InternalError(f"what the peer answers is not valid: {error}") from None

    async def _send(self, address: Address, method: str, raw: bytes, timeout_s: float) -> bytes:
        deadline = asyncio.get_running_loop().time() + timeout_s
        channel = await self._channels.get(address, timeout_s)
        path = f"/{pb.DESCRIPTOR.package}.Expert/{method}"
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        left_s = max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            answer: bytes = await call(raw, timeout=left_s, metadata=self._caller.metadata(address, path))
        except grpc.aio.AioRpcError as error:
            rebuilt = rebuilt_error(error.code(), error.details(), error.trailing_metadata())
            if isinstance(rebuilt, NotConnectedError):
                # A peer that was started again has another certificate: the next call fetches it.
                self._channels.drop(address)
            raise rebuilt from None
        self.wire_bytes += len(raw) + len(answer)
        return answer

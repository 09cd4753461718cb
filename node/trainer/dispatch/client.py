"""gRPC calls to hosts: one channel per peer, a deadline on every call, typed errors back. On the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from common.errors import InternalError, InvalidInputError, OverloadedError
from protocol import expert_pb2 as pb
from protocol.channels import Channels
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from protocol.endpoints import Address
    from protocol.security import Caller

Res = TypeVar("Res", bound=Message)


class ExpertClient:
    """Calls hosts by address, over `channels`. `wire_bytes` counts messages' bytes, both ways."""

    def __init__(self, caller: Caller) -> None:
        self.channels = Channels(caller)
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
        await self.channels.close()

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
        answer = await self.channels.call(address, f"/{pb.DESCRIPTOR.package}.Expert/{method}", raw, timeout_s)
        self.wire_bytes += len(raw) + len(answer)
        return answer

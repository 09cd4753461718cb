"""The contributor's calls: an expert to an evaluator, questions about it, and what was signed to the block's hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import Message

from node.rpc.upload import INTAKE, UPLOAD_S, begin_of, file_messages
from node.trainer.evaluator.evaluation_service import SERVICE_NAME as EVALUATION
from protocol import contribution_pb2 as pb
from protocol.call_errors import rebuilt_error
from protocol.channels import OPEN_TIMEOUT_S
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from protocol.endpoints import Address
    from protocol.security import Caller
    from protocol.verdict import Offered

Res = TypeVar("Res", bound=Message)
ASK_TIMEOUT_S = 10.0


class ContributionClient:
    """Calls trainers and hosts by address. Every call raises the callee's error, UnavailableError or DeadlineError."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def offer(self, trainer: Address, offered: Offered, data: bytes) -> pb.OfferStatus:
        """Leave a file to be evaluated."""
        messages = file_messages(begin_of(offered, data), data)
        return await self._upload(trainer, f"/{EVALUATION}/Offer", messages, pb.OfferStatus)

    async def ask(self, trainer: Address, offered: Offered) -> pb.OfferStatus:
        """How far it is; UnknownRequestError if the trainer does not know it any more."""
        path = f"/{EVALUATION}/Ask"
        request = pb.AskRequest(
            run_id=offered.run_id, layer=offered.layer, expert=offered.expert, sha256=offered.sha256
        )
        async with await self._caller.open(trainer, OPEN_TIMEOUT_S) as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            try:
                raw: bytes = await call(
                    request.SerializeToString(), timeout=ASK_TIMEOUT_S, metadata=self._caller.metadata(trainer, path)
                )
            except grpc.aio.AioRpcError as error:
                raise rebuilt_error(error.code(), error.details(), error.trailing_metadata()) from None
        return parse_message(pb.OfferStatus, raw)

    async def take_in(self, host: Address, offered: Offered, data: bytes, verdicts: Sequence[pb.SignedVerdict]) -> int:
        """Have a host take it in; the version of its block with the expert in it."""
        begin = begin_of(offered, data)
        begin.verdicts.extend(verdicts)
        answer = await self._upload(host, f"/{INTAKE}/TakeIn", file_messages(begin, data), pb.TakeInResponse)
        return answer.version

    async def _upload(self, address: Address, path: str, messages: Iterable[bytes], response: type[Res]) -> Res:
        async with await self._caller.open(address, OPEN_TIMEOUT_S) as channel:
            call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(path)
            metadata = self._caller.metadata(address, path)
            try:
                raw: bytes = await call(iter(messages), timeout=UPLOAD_S, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                raise rebuilt_error(error.code(), error.details(), error.trailing_metadata()) from None
        return parse_message(response, raw)

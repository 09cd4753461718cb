"""The gRPC service of a host: checks what came in, hands it to the runtime, answers. Runs on the event loop.

Requests arrive as bytes and are parsed here, so that truncated bytes get a typed error like every other bad input.
Shapes: T tokens, D model width.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from node.experts.layer import check_hosted
from node.serving.kept_inputs import Inputs, RequestKey
from node.serving.runtime import BackwardJob, ForwardJob, Runtime
from node.wire import decode_inputs, decode_rows
from protocol import expert_pb2 as pb
from protocol.errors import (
    MAX_MESSAGE_CHARS,
    DeadlineError,
    InvalidInputError,
    KilohiveError,
    NotHostedError,
    UnknownRunError,
    status_of,
    trailing_metadata_of,
)
from protocol.limits import MAX_DEADLINE_S, MAX_RUN_TOKENS, REQUEST_ID_BYTES
from protocol.tensors import encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

    import torch

    from protocol.manifest import Manifest

    Context = grpc.aio.ServicerContext[bytes, Message]

Req = TypeVar("Req", bound=Message)
R = TypeVar("R")
logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Expert"].full_name


class ExpertService:
    """Forward, Backward and Describe over one runtime."""

    def __init__(
        self, manifest: Manifest, runtime: Runtime, device: torch.device, describe: pb.DescribeResponse
    ) -> None:
        self._manifest, self._runtime, self._device = manifest, runtime, device
        self._identity = describe
        self.calls_ok = 0
        self.calls_refused = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Forward": grpc.unary_unary_rpc_method_handler(self._guarded(pb.ForwardRequest, self.forward)),
            "Backward": grpc.unary_unary_rpc_method_handler(self._guarded(pb.BackwardRequest, self.backward)),
            "Describe": grpc.unary_unary_rpc_method_handler(self._guarded(pb.DescribeRequest, self.describe)),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def forward(self, request: pb.ForwardRequest, timeout_s: float) -> pb.ForwardResponse:
        """Combine the request's pairs; raises a KilohiveError for anything that is off."""
        key = self._request_key(request.run_id, request.request_id, request.layer)
        inputs = self._inputs(request.inputs, request.layer)
        job = ForwardJob(key=key, inputs=inputs, keep=request.keep_inputs, deadline=time.monotonic() + timeout_s)
        self._runtime.submit(job)
        y_TD = await _result(job.future, timeout_s)
        combined = encode(y_TD, self._manifest.codec)
        return pb.ForwardResponse(combined_TD=combined, queue_tokens=self._runtime.queue_tokens)

    async def backward(self, request: pb.BackwardRequest, timeout_s: float) -> pb.BackwardResponse:
        """Gradients for tokens and pair weights; at most one optimizer step per request id."""
        key = self._request_key(request.run_id, request.request_id, request.layer)
        if request.run_tokens > MAX_RUN_TOKENS:
            raise InvalidInputError("run_tokens", f"is {request.run_tokens}, the limit is {MAX_RUN_TOKENS}")
        inputs = self._inputs(request.inputs, request.layer) if request.HasField("inputs") else None
        rows = len(inputs.x_TD) if inputs else None
        grad_TD = decode_rows(request.grad_combined_TD, "grad_combined_TD", rows, self._manifest).to(self._device)
        job = BackwardJob(
            key=key,
            grad_TD=grad_TD,
            inputs=inputs,
            run_tokens=request.run_tokens,
            deadline=time.monotonic() + timeout_s,
        )
        self._runtime.submit(job)
        result = await _result(job.future, timeout_s)
        return pb.BackwardResponse(
            grad_tokens_TD=encode(result.tokens_TD, self._manifest.codec),
            grad_weight_P=encode(result.weight_P, "fp64" if self._manifest.codec == "fp64" else "fp32"),
            stepped=result.stepped,
        )

    async def describe(self, request: pb.DescribeRequest, timeout_s: float) -> pb.DescribeResponse:  # noqa: ARG002 - one signature for all calls
        """What this host holds; an empty run id asks for whatever run it serves."""
        if request.run_id:
            self._check_run(request.run_id)
        answer = pb.DescribeResponse()
        answer.CopyFrom(self._identity)
        answer.queue_tokens = self._runtime.queue_tokens
        answer.tokens_total = self._runtime.tokens_total
        for block_id, block in self._runtime.blocks.items():
            answer.blocks.add(
                layer=block_id.layer, block=block_id.block, version=block.version, n_experts=len(block.experts)
            )
        return answer

    def _inputs(self, message: pb.Inputs, layer: int) -> Inputs:
        inputs = decode_inputs(message, self._manifest)
        check_hosted(self._runtime.layer_blocks(layer), inputs.pairs.expert_P, layer)
        return Inputs(inputs.x_TD.to(self._device), inputs.pairs.to(self._device))

    def _request_key(self, run_id: str, request_id: bytes, layer: int) -> RequestKey:
        self._check_run(run_id)
        if len(request_id) != REQUEST_ID_BYTES:
            raise InvalidInputError("request_id", f"has {len(request_id)} bytes, must have {REQUEST_ID_BYTES}")
        if not self._runtime.layer_blocks(layer):
            raise NotHostedError("layer", f"no block of layer {layer} is hosted here")
        return RequestKey(layer, request_id)

    def _check_run(self, run_id: str) -> None:
        if run_id != self._manifest.run_id:
            raise UnknownRunError("run_id", f"is {run_id[:100]!r}, this host serves {self._manifest.run_id!r}")

    def _guarded(
        self, request_type: type[Req], call: Callable[[Req, float], Awaitable[Message]]
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def handle(raw: bytes, context: Context) -> bytes:
            try:
                answer = await call(_parse(request_type, raw), _timeout_s(context))
                self.calls_ok += 1
                return answer.SerializeToString()
            except KilohiveError as error:
                failure = error
            except Exception as error:
                # Task boundary: a bug of ours must not end the host or show the peer its inside.
                logger.exception("A %s call failed", request_type.__name__)
                failure = KilohiveError(f"the host failed: {type(error).__name__}")
            self.calls_refused += 1
            await context.abort(status_of(failure), str(failure)[:MAX_MESSAGE_CHARS], trailing_metadata_of(failure))
            raise failure

        return handle


def _parse(request_type: type[Req], raw: bytes) -> Req:
    request = request_type()
    try:
        request.ParseFromString(raw)
    except DecodeError:
        name = request_type.DESCRIPTOR.full_name
        raise InvalidInputError("message", f"{len(raw)} bytes are not a whole {name}") from None
    return request


def _timeout_s(context: Context) -> float:
    remaining = context.time_remaining()
    timeout_s = MAX_DEADLINE_S if remaining is None else min(remaining, MAX_DEADLINE_S)
    if timeout_s <= 0:
        raise DeadlineError("the deadline had passed when the request arrived")
    return timeout_s


async def _result(future: Future[R], timeout_s: float) -> R:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
    except TimeoutError:
        raise DeadlineError(f"the answer would come after the deadline of {timeout_s:.1f} s") from None

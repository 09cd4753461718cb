"""The gRPC service of a host: checks what came in, hands it to the runtime, answers. Runs on the event loop.

Requests arrive as bytes and are parsed here, so that truncated bytes get a typed error like every other bad input.
Shapes: T tokens, D model width.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import torch

from common.errors import DeadlineError, InvalidInputError, NotHostedError, UnknownRunError
from node.credit.answered import AnsweredPairs, PairCounts
from node.host.serving.activation_cache import CheckedInputs, RequestKey
from node.host.serving.jobs import BackwardJob, ForwardJob
from node.model.experts.layer import check_hosted
from node.rpc.expert_codec import decode_inputs, decode_rows, weight_codec
from node.rpc.handlers import CallCounts, timeout_s, unary, unary_in_context
from protocol import expert_pb2 as pb
from protocol.call_signature import caller_of
from protocol.limits import MAX_RUN_TOKENS, REQUEST_ID_BYTES
from protocol.manifest import BlockId
from protocol.tensors import encode

if TYPE_CHECKING:
    from concurrent.futures import Future

    from node.host.serving.runtime import Runtime
    from protocol.manifest import Manifest

    Context = grpc.aio.ServicerContext[Any, Any]

R = TypeVar("R")

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Expert"].full_name


class ExpertService:
    """Forward, Backward and Describe over one runtime. `answered` counts pairs by who signed the call."""

    def __init__(
        self, manifest: Manifest, runtime: Runtime, device: torch.device, describe: pb.DescribeResponse
    ) -> None:
        self._manifest, self._runtime, self._device = manifest, runtime, device
        self._identity = describe
        self._calls = CallCounts()
        self.answered = AnsweredPairs()

    @property
    def calls_ok(self) -> int:
        """Calls answered."""
        return self._calls.ok

    @property
    def calls_refused(self) -> int:
        """Calls refused with an error."""
        return self._calls.refused

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Forward": grpc.unary_unary_rpc_method_handler(
                unary_in_context(pb.ForwardRequest, self._forward_counted, self._calls)
            ),
            "Backward": grpc.unary_unary_rpc_method_handler(
                unary_in_context(pb.BackwardRequest, self._backward_counted, self._calls)
            ),
            "Describe": grpc.unary_unary_rpc_method_handler(unary(pb.DescribeRequest, self.describe, self._calls)),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def forward(self, request: pb.ForwardRequest, timeout_s: float) -> pb.ForwardResponse:
        """Combine the request's pairs; raises a KilohiveError for anything that is off."""
        key = self._request_key(request.run_id, request.request_id, request.layer)
        inputs = self._inputs(request.inputs, request.layer)
        job = ForwardJob(key=key, inputs=inputs, keep=request.keep_inputs, deadline=time.monotonic() + timeout_s)
        self._runtime.submit(job)
        result = await _result(job.future, timeout_s)
        return pb.ForwardResponse(
            combined_TD=encode(result.combined_TD, self._manifest.codec),
            queue_tokens=self._runtime.queue_tokens,
            version=result.version,
        )

    async def backward(self, request: pb.BackwardRequest, timeout_s: float) -> pb.BackwardResponse:
        """Gradients for tokens and pair weights; at most one optimizer step per request id, smaller or none if late."""
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
            version=request.version,
            no_step=request.no_step,
        )
        self._runtime.submit(job)
        result = await _result(job.future, timeout_s)
        return pb.BackwardResponse(
            grad_tokens_TD=encode(result.tokens_TD, self._manifest.codec),
            grad_weight_P=encode(result.weight_P, weight_codec(self._manifest.codec)),
            stepped=result.stepped,
            staleness=result.staleness,
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

    async def _forward_counted(self, request: pb.ForwardRequest, context: Context) -> pb.ForwardResponse:
        answer = await self.forward(request, timeout_s(context))
        self._count(context, PairCounts(forward=request.inputs.pairs.token_P.shape[0]))
        return answer

    async def _backward_counted(self, request: pb.BackwardRequest, context: Context) -> pb.BackwardResponse:
        answer = await self.backward(request, timeout_s(context))
        self._count(context, PairCounts(backward=answer.grad_weight_P.shape[0]))
        return answer

    def _count(self, context: Context, pairs: PairCounts) -> None:
        caller = caller_of(context.invocation_metadata() or ())
        if caller is not None:
            self.answered.add(caller, pairs)

    def _inputs(self, message: pb.Inputs, layer: int) -> CheckedInputs:
        inputs = decode_inputs(message, self._manifest)
        expert_P = inputs.pairs.expert_P
        check_hosted(self._runtime.layer_blocks(layer), expert_P, layer)
        # Here, where the indices still lie on the CPU: on a GPU each look at them would wait for its queue.
        touched = torch.bincount(expert_P // self._manifest.model.experts_per_block).nonzero().flatten().tolist()
        blocks = frozenset(BlockId(layer, block) for block in touched)
        return CheckedInputs(inputs.x_TD.to(self._device), inputs.pairs.to(self._device), blocks)

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


async def _result(future: Future[R], timeout_s: float) -> R:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
    except TimeoutError:
        raise DeadlineError(f"the answer would come after the deadline of {timeout_s:.1f} s") from None

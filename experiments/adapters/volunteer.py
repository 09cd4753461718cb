"""What a volunteer gives for one adapter: memory by the product's own blocks, bytes by its own messages.

Shapes: T tokens, P pairs, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from node.model.experts.block import new_block
from node.model.experts.state import block_state
from node.model.pairs import Pairs
from node.rpc.expert_codec import encode_inputs
from protocol import expert_pb2 as pb
from protocol.manifest import BlockId
from protocol.tensors import encode

if TYPE_CHECKING:
    from protocol.manifest import Manifest

CALL_TOKENS = 256
"""Tokens of one call, which share what a message costs besides its tensors."""

REQUEST_ID_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Volunteer:
    """What one adapter takes: parameters, bytes with moments and counters, and bytes both ways for each token."""

    parameters: int
    memory_bytes: int
    block_adapters: int
    wire_bytes_per_token: float
    share: float
    """The share of the run's tokens that come to it, on average."""


def volunteer(manifest: Manifest) -> Volunteer:
    """Who holds one adapter of one layer of this run."""
    model = manifest.model
    block = new_block(manifest, BlockId(0, 0), torch.device("cpu"))
    state = block_state(block)
    n_bytes = sum(t.nbytes for t in (*state.named().values(), state.steps_R, state.learnt_R))
    return Volunteer(
        parameters=sum(p[0].numel() for p in block.params.values()),
        memory_bytes=n_bytes // len(block.experts),
        block_adapters=len(block.experts),
        wire_bytes_per_token=wire_bytes(manifest, CALL_TOKENS) / CALL_TOKENS,
        share=model.experts_per_token / model.experts_per_layer,
    )


def wire_bytes(manifest: Manifest, n_tokens: int) -> int:
    """Count the bytes of the four messages of one training step with one pair per token, in the run's codec."""
    x_TD, weight_P = torch.ones(n_tokens, manifest.model.d_model), torch.ones(n_tokens)
    # Ids as large as a run's are: small numbers would be as large, they are sent as int32.
    pairs = Pairs(torch.arange(n_tokens), torch.zeros(n_tokens, dtype=torch.int64), weight_P)
    tokens, request_id = encode(x_TD, manifest.codec), bytes(REQUEST_ID_BYTES)
    forward = pb.ForwardRequest(
        run_id=manifest.run_id,
        request_id=request_id,
        inputs=encode_inputs(x_TD, pairs, manifest.codec),
        keep_inputs=True,
    )
    backward = pb.BackwardRequest(run_id=manifest.run_id, request_id=request_id, grad_combined_TD=tokens)
    answers = (
        pb.ForwardResponse(combined_TD=tokens),
        pb.BackwardResponse(grad_tokens_TD=tokens, grad_weight_P=encode(weight_P, "fp32"), stepped=True),
    )
    return sum(message.ByteSize() for message in (forward, backward, *answers))

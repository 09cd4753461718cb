"""What one call may carry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from node.model.pairs import Pairs
from node.rpc.expert_codec import encode_inputs, max_tokens_per_call
from protocol import expert_pb2 as pb
from protocol.limits import MAX_MESSAGE_BYTES, MAX_PAIRS, MAX_TENSOR_ELEMENTS, MAX_TOKENS
from protocol.tensors import encode
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from protocol.manifest import Codec


@pytest.mark.parametrize("codec", ["fp64", "fp32", "fp16", "int8"])
@pytest.mark.parametrize(("d_model", "k"), [(16, 1), (256, 8), (4096, 256), (16_384, 2)])
def test_the_largest_call_fits_a_message_and_one_token_more_would_not(codec: Codec, d_model: int, k: int) -> None:
    model = {"d_model": d_model, "experts_per_layer": 256, "experts_per_token": k}
    manifest = small_manifest(codec=codec, dtype="fp64" if codec == "fp64" else "fp32", model=model)
    most = max_tokens_per_call(manifest)
    assert most <= min(MAX_TOKENS, MAX_PAIRS // k, MAX_TENSOR_ELEMENTS // d_model)
    per_token = _size(manifest.codec, 2, d_model, k) - _size(manifest.codec, 1, d_model, k)
    assert most * per_token < MAX_MESSAGE_BYTES
    limited_by_bytes = most < min(MAX_TOKENS, MAX_PAIRS // k, MAX_TENSOR_ELEMENTS // d_model)
    assert not limited_by_bytes or (most + 1) * per_token > MAX_MESSAGE_BYTES * 0.99 - 2 * per_token


def _size(codec: Codec, n_tokens: int, d_model: int, k: int) -> int:
    """Bytes of a backward that brings its inputs along."""
    x_TD, zeros = torch.zeros(n_tokens, d_model), torch.zeros(n_tokens * k, dtype=torch.int64)
    inputs = encode_inputs(x_TD, Pairs(zeros, zeros, torch.zeros(n_tokens * k)), codec)
    return pb.BackwardRequest(inputs=inputs, grad_combined_TD=encode(x_TD, codec)).ByteSize()

"""Requests' inputs as messages and back: a trainer's dispatch encodes, a host's service checks and decodes.

Shapes: T tokens, P pairs, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import InvalidInputError, LimitExceededError
from node.model.pairs import Inputs, Pairs
from protocol import expert_pb2 as pb
from protocol.limits import MAX_MESSAGE_BYTES, MAX_PAIRS, MAX_TENSOR_ELEMENTS, MAX_TOKENS
from protocol.tensors import (
    DTYPES,
    INDEX_BYTES,
    SCALE_BYTES,
    TensorSpec,
    bytes_per_value,
    decode,
    decode_indices,
    encode_indices_into,
    encode_into,
)

if TYPE_CHECKING:
    import torch

    from protocol.manifest import Codec, Manifest

MAX_HEADER_BYTES = 4096
"""The room in a message for all that is no tensor's data, and for the lengths and shapes of the tensors."""


def weight_codec(codec: Codec) -> Codec:
    """The codec of weights and of their gradients: full precision, since each is one number for D."""
    return "fp64" if codec == "fp64" else "fp32"


def max_tokens_per_call(manifest: Manifest) -> int:
    """The most tokens of one call: a backward that brings its inputs along is the largest message."""
    model = manifest.model
    token_bytes = 2 * (model.d_model * bytes_per_value(manifest.codec) + SCALE_BYTES)
    pair_bytes = model.experts_per_token * (2 * INDEX_BYTES + bytes_per_value(weight_codec(manifest.codec)))
    by_bytes = (MAX_MESSAGE_BYTES - MAX_HEADER_BYTES) // (token_bytes + pair_bytes)
    by_pairs, by_elements = MAX_PAIRS // model.experts_per_token, MAX_TENSOR_ELEMENTS // model.d_model
    return max(1, min(MAX_TOKENS, by_pairs, by_elements, by_bytes))


def encode_inputs(x_TD: torch.Tensor, pairs: Pairs, codec: Codec) -> pb.Inputs:
    """Tokens in the run's codec, weights in theirs."""
    message = pb.Inputs()
    encode_into(message.tokens_TD, x_TD, codec)
    encode_pairs_into(message.pairs, pairs, codec)
    return message


def encode_pairs_into(message: pb.Pairs, pairs: Pairs, codec: Codec) -> None:
    """Fill an empty message with the pairs of a request whose tokens are in `codec`."""
    encode_indices_into(message.token_P, pairs.token_P)
    encode_indices_into(message.expert_P, pairs.expert_P)
    encode_into(message.weight_P, pairs.weight_P, weight_codec(codec))


def decode_inputs(message: pb.Inputs, manifest: Manifest) -> Inputs:
    """Checked inputs on the CPU; raises InvalidInputError naming the field and the limit."""
    model, dtype = manifest.model, DTYPES[manifest.dtype]
    n_tokens, n_pairs = (
        _count(message.tokens_TD, "inputs.tokens_TD"),
        _count(message.pairs.token_P, "inputs.pairs.token_P"),
    )
    if n_tokens > MAX_TOKENS:
        raise LimitExceededError("inputs.tokens_TD rows", n_tokens, MAX_TOKENS)
    if n_pairs > min(MAX_PAIRS, n_tokens * model.experts_per_token):
        raise LimitExceededError("inputs.pairs", n_pairs, min(MAX_PAIRS, n_tokens * model.experts_per_token))
    tokens = TensorSpec(field="inputs.tokens_TD", shape=(None, model.d_model))
    token_spec, expert_spec, weight_spec = (
        TensorSpec(field=f"inputs.pairs.{name}", shape=(n_pairs,), max_elements=MAX_PAIRS)
        for name in ("token_P", "expert_P", "weight_P")
    )
    return Inputs(
        x_TD=decode(message.tokens_TD, tokens, dtype),
        pairs=Pairs(
            token_P=decode_indices(message.pairs.token_P, token_spec, n_tokens),
            expert_P=decode_indices(message.pairs.expert_P, expert_spec, model.experts_per_layer),
            weight_P=decode(message.pairs.weight_P, weight_spec, dtype),
        ),
    )


def decode_rows(message: pb.Tensor, field: str, n_rows: int | None, manifest: Manifest) -> torch.Tensor:
    """[n_rows, D] in the run's dtype; None leaves the number of rows free, up to MAX_TOKENS."""
    model = manifest.model
    elements = min(MAX_TENSOR_ELEMENTS, MAX_TOKENS * model.d_model)
    spec = TensorSpec(field=field, shape=(n_rows, model.d_model), max_elements=elements)
    return decode(message, spec, DTYPES[manifest.dtype])


def _count(message: pb.Tensor, field: str) -> int:
    if not message.shape or not message.shape[0]:
        raise InvalidInputError(field, "is empty")
    return int(message.shape[0])

"""The only place that turns tensors into bytes and back.

A tensor from a peer is checked against a `TensorSpec` (codec, shape, byte count, finite, magnitude) before anything is
allocated for it. Never pickle.

Shapes: T tokens, D model width, P (token, expert) pairs, R rows, N columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.errors import InvalidInputError, LimitExceededError
from protocol import expert_pb2 as pb
from protocol.limits import MAX_TENSOR_DIMS, MAX_TENSOR_ELEMENTS, MAX_VALUE

if TYPE_CHECKING:
    from protocol.manifest import Codec, Dtype

CODECS: dict[Codec, pb.Codec] = {
    "fp64": pb.CODEC_FP64,
    "fp32": pb.CODEC_FP32,
    "bf16": pb.CODEC_BF16,
    "fp16": pb.CODEC_FP16,
    "int8": pb.CODEC_INT8,
}
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp64": torch.float64}

_STORED_AS: dict[pb.Codec, torch.dtype] = {
    pb.CODEC_FP64: torch.float64,
    pb.CODEC_FP32: torch.float32,
    pb.CODEC_BF16: torch.bfloat16,
    pb.CODEC_FP16: torch.float16,
    pb.CODEC_INT8: torch.int8,
    pb.CODEC_INT32: torch.int32,
}
INDEX_BYTES = torch.int32.itemsize
SCALE_BYTES = torch.float32.itemsize
_FLOATS = frozenset(CODECS.values())
_INT8_MAX = 127
_FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a peer may send in one field. `None` in `shape` leaves that dimension free, up to `max_elements` in all."""

    field: str
    shape: tuple[int | None, ...]
    max_elements: int = MAX_TENSOR_ELEMENTS


def bytes_per_value(codec: Codec) -> int:
    """Return the bytes of one entry of a tensor; `int8` adds SCALE_BYTES for each row."""
    return _STORED_AS[CODECS[codec]].itemsize


def magnitude(x: torch.Tensor) -> float:
    """The largest absolute value of any entry, 0 without entries; NaN or infinity if an entry is that."""
    # One pass: NaN and infinities propagate into the extremes.
    low, high = (float(v) for v in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
    return max(-low, high)


def check_range(x: torch.Tensor, field: str) -> float:
    """The magnitude of x; InvalidInputError unless every entry is what a peer would take: finite, MAX_VALUE at most."""
    largest = magnitude(x)
    if not math.isfinite(largest):
        raise InvalidInputError(field, "holds NaN or infinity; every entry must be finite")
    if largest > MAX_VALUE:
        raise LimitExceededError(f"{field} magnitude", largest, MAX_VALUE, "the square of an entry must be finite")
    return largest


def encode(x: torch.Tensor, codec: Codec) -> pb.Tensor:
    """Message for a float tensor of any shape; `int8` keeps one absmax scale per row of the last dimension.

    fp16 saturates at its largest value: an infinity would be refused by the receiver.
    """
    message = pb.Tensor()
    encode_into(message, x, codec)
    return message


def encode_into(message: pb.Tensor, x: torch.Tensor, codec: Codec) -> None:
    """Fill an empty message, which may be part of another: a message that is put into another is copied."""
    stored, scale_R = _stored(x, codec)
    _fill(message, codec, stored.view(x.shape), scale_R)


class EncodedRows:
    """A matrix that is encoded once, and of whose rows each of several messages takes some."""

    def __init__(self, x_RN: torch.Tensor, codec: Codec) -> None:
        self._codec = codec
        self._stored_RN, self._scale_R = _stored(x_RN, codec)

    def put(self, message: pb.Tensor, rows: torch.Tensor) -> None:
        """Fill an empty message with some rows (int64), as `encode_into` would."""
        scale_R = None if self._scale_R is None else self._scale_R.index_select(0, rows)
        _fill(message, self._codec, self._stored_RN.index_select(0, rows), scale_R)


def _stored(x: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The values as a message holds them, in rows for `int8`, whose scales come second."""
    kind, x = CODECS[codec], x.detach()
    if kind == pb.CODEC_INT8:
        return _quantise_rows(x.to(torch.float32).reshape(-1, x.shape[-1] if x.dim() else 1))
    return (x.clamp(-_FP16_MAX, _FP16_MAX) if kind == pb.CODEC_FP16 else x).to(_STORED_AS[kind]), None


def _fill(message: pb.Tensor, codec: Codec, stored: torch.Tensor, scale_R: torch.Tensor | None) -> None:
    message.codec = CODECS[codec]
    message.shape.extend(stored.shape)
    message.data = _to_bytes(stored)
    if scale_R is not None:
        message.scales = _to_bytes(scale_R)


def is_lossless(codec: Codec, dtype: torch.dtype) -> bool:
    """Whether values of `dtype` come back from the codec bit by bit."""
    return _STORED_AS[CODECS[codec]] == dtype


def encode_indices_into(message: pb.Tensor, index_P: torch.Tensor) -> None:
    """Fill an empty message with a vector of indices below 2**31."""
    message.codec = pb.CODEC_INT32
    message.shape.extend(index_P.shape)
    message.data = _to_bytes(index_P.to(torch.int32))


def decode(message: pb.Tensor, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
    """Float tensor of `dtype` on the CPU; raises InvalidInputError naming the field for anything that is off."""
    if message.codec not in _FLOATS:
        raise InvalidInputError(spec.field, f"codec {message.codec} is not one of {', '.join(CODECS)}")
    data = message.data  # once: every look at a message's bytes copies them
    shape = _checked_shape(message, len(data), spec)
    stored = _from_bytes(data, _STORED_AS[message.codec]).view(shape)
    if message.codec == pb.CODEC_INT8:
        return _dequantised(message, stored, spec).to(dtype)
    x = stored.to(dtype)
    check_range(x, spec.field)
    return x


def decode_indices(message: pb.Tensor, spec: TensorSpec, upper: int) -> torch.Tensor:
    """int64 vector with every entry in [0, upper)."""
    if message.codec != pb.CODEC_INT32:
        raise InvalidInputError(spec.field, f"codec {message.codec} is not int32")
    data = message.data
    shape = _checked_shape(message, len(data), spec)
    index_P = _from_bytes(data, torch.int32).view(shape).long()
    if index_P.numel():
        low, high = (int(v) for v in torch.aminmax(index_P))
        if low < 0 or high >= upper:
            raise InvalidInputError(spec.field, f"index {low if low < 0 else high} is outside 0 to {upper - 1}")
    return index_P


def _checked_shape(message: pb.Tensor, n_bytes: int, spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(message.shape)
    if len(shape) > MAX_TENSOR_DIMS or len(shape) != len(spec.shape):
        raise InvalidInputError(spec.field, f"has {len(shape)} dimensions, must have {len(spec.shape)}")
    if any(want is not None and have != want for have, want in zip(shape, spec.shape, strict=True)):
        wanted = " x ".join("any" if want is None else str(want) for want in spec.shape)
        raise InvalidInputError(spec.field, f"shape is {' x '.join(map(str, shape))}, must be {wanted}")
    elements = math.prod(shape)
    if elements > spec.max_elements:
        raise LimitExceededError(f"{spec.field} elements", elements, spec.max_elements)
    expected = elements * _STORED_AS[message.codec].itemsize
    if n_bytes != expected:
        raise InvalidInputError(spec.field, f"has {n_bytes} bytes, its shape needs {expected}")
    return shape


def _quantise_rows(x_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not x_RN.numel():
        return x_RN.to(torch.int8), x_RN.new_zeros(len(x_RN))
    # Two reductions take a sixth of the time of torch.aminmax along a dimension, which is not vectorised.
    scale_R = torch.maximum(-x_RN.amin(-1), x_RN.amax(-1)) / _INT8_MAX
    # A row so near to zero that 1 / scale would be infinite is one of zeros. No product rounds to more than _INT8_MAX.
    inverse_R = torch.where(scale_R > torch.finfo(scale_R.dtype).tiny, 1 / scale_R, 0.0)
    return (x_RN * inverse_R[:, None]).round_().to(torch.int8), scale_R


def _dequantised(message: pb.Tensor, q: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    scales, expected = message.scales, math.prod(q.shape[:-1]) * SCALE_BYTES
    if len(scales) != expected:
        raise InvalidInputError(spec.field, f"has {len(scales)} bytes of scales, its shape needs {expected}")
    scale_R = _from_bytes(scales, torch.float32)
    largest = check_range(scale_R, f"{spec.field} scales")
    x = q.to(torch.float32).mul_(scale_R.view(*q.shape[:-1], 1))  # q times the scale would make a copy twice
    # Scales bound the values: only where that does not do must these be looked at.
    if largest > MAX_VALUE / (_INT8_MAX + 1):
        check_range(x, spec.field)
    return x


def _to_bytes(x: torch.Tensor) -> bytes:
    x = x.cpu()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy().tobytes()  # numpy knows no bfloat16


def _from_bytes(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    # bytearray: torch wants memory that it may write to.
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInputError, LimitExceededError
from protocol import expert_pb2 as pb
from protocol.tensors import CODECS, EncodedRows, TensorSpec, decode, decode_indices, encode, encode_indices_into

if TYPE_CHECKING:
    from protocol.manifest import Codec

SPEC = TensorSpec(field="tokens_TD", shape=(None, 8))
RELATIVE_ERROR: dict[Codec, float] = {"fp64": 0.0, "fp32": 1e-7, "bf16": 2**-8, "fp16": 2**-10, "int8": 1 / 127}


def sample(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("codec", list(CODECS))
def test_a_tensor_comes_back_within_the_codecs_precision(codec: Codec) -> None:
    x = sample()
    back = decode(encode(x, codec), SPEC, torch.float64)
    scale = x.abs().amax(dim=1, keepdim=True)
    assert bool(((back - x).abs() <= RELATIVE_ERROR[codec] * scale).all())


@pytest.mark.parametrize("codec", list(CODECS))
def test_no_rows_come_back_as_no_rows(codec: Codec) -> None:
    assert decode(encode(sample(0), codec), SPEC, torch.float32).shape == (0, 8)


def test_rows_of_zeros_survive_int8() -> None:
    assert torch.equal(decode(encode(torch.zeros(3, 8), "int8"), SPEC, torch.float32), torch.zeros(3, 8))


def test_fp16_saturates_where_it_would_overflow() -> None:
    back = decode(encode(torch.full((1, 8), 1e6), "fp16"), SPEC, torch.float32)
    assert torch.equal(back, torch.full((1, 8), 65504.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", ["fp64", "fp32", "bf16"])
def test_values_that_are_not_finite_are_refused(bad: float, codec: Codec) -> None:
    x = sample()
    x[1, 2] = bad
    with pytest.raises(InvalidInputError, match="tokens_TD: holds NaN or infinity"):
        decode(encode(x, codec), SPEC, torch.float32)


def test_a_scale_that_is_not_finite_is_refused() -> None:
    message = encode(sample(), "int8")
    message.scales = torch.full((5,), float("inf")).numpy().tobytes()
    with pytest.raises(InvalidInputError, match="tokens_TD scales: holds NaN or infinity"):
        decode(message, SPEC, torch.float32)


def test_a_magnitude_beyond_the_limit_is_refused() -> None:
    with pytest.raises(LimitExceededError, match="tokens_TD magnitude"):
        decode(encode(torch.full((1, 8), 1e30), "fp32"), SPEC, torch.float32)


def change(message: pb.Tensor, **fields: object) -> pb.Tensor:
    changed = pb.Tensor()
    changed.CopyFrom(message)
    for name, value in fields.items():
        if name == "shape":
            del changed.shape[:]
            changed.shape.extend(value)  # type: ignore[arg-type]
        else:
            setattr(changed, name, value)
    return changed


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"codec": 0}, "codec 0 is not one of"),
        ({"codec": 99}, "codec 99 is not one of"),
        ({"codec": pb.CODEC_INT32}, "codec 6 is not one of"),
        ({"shape": [5, 9]}, "shape is 5 x 9, must be any x 8"),
        ({"shape": [5]}, "has 1 dimensions, must have 2"),
        ({"shape": [5, 8, 1]}, "has 3 dimensions, must have 2"),
        ({"shape": [4, 8]}, "has 160 bytes, its shape needs 128"),
        ({"shape": [2**31, 8]}, "the limit is 16777216"),
        ({"data": b""}, "has 0 bytes, its shape needs 160"),
        ({"data": b"x" * 159}, "has 159 bytes, its shape needs 160"),
        ({"codec": pb.CODEC_INT8, "data": b"x" * 40, "scales": b"x" * 19}, "has 19 bytes of scales"),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused_by_field(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem) as caught:
        decode(change(encode(sample(), "fp32"), **fields), SPEC, torch.float32)
    assert caught.value.field.startswith("tokens_TD")


@given(
    codec=st.integers(-1, 8),
    shape=st.lists(st.integers(0, 2**32 - 1), max_size=6),
    data=st.binary(max_size=400),
    scales=st.binary(max_size=40),
)
def test_any_bytes_give_a_tensor_of_the_asked_shape_or_a_typed_error(
    codec: int, shape: list[int], data: bytes, scales: bytes
) -> None:
    message = pb.Tensor(codec=max(0, codec), shape=shape, data=data, scales=scales)  # type: ignore[arg-type]
    try:
        x = decode(message, SPEC, torch.float32)
    except InvalidInputError:
        return
    assert x.shape[1] == 8
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("codec", list(CODECS))
def test_rows_that_are_encoded_once_make_the_messages_that_they_would_make_alone(codec: Codec) -> None:
    x, once = sample(), EncodedRows(sample(), codec)
    for rows in ([0, 1, 2, 3, 4], [1, 3], [4], []):
        message = pb.Tensor()
        once.put(message, torch.tensor(rows, dtype=torch.int64))
        assert message == encode(x[rows], codec)


def encoded_indices(index_P: torch.Tensor) -> pb.Tensor:
    message = pb.Tensor()
    encode_indices_into(message, index_P)
    return message


def test_indices_come_back_and_are_bounded() -> None:
    spec = TensorSpec(field="expert_P", shape=(3,))
    index_P = torch.tensor([0, 7, 3])
    assert torch.equal(decode_indices(encoded_indices(index_P), spec, 8), index_P)
    with pytest.raises(InvalidInputError, match="expert_P: index 7 is outside 0 to 6"):
        decode_indices(encoded_indices(index_P), spec, 7)
    with pytest.raises(InvalidInputError, match="index -1 is outside"):
        decode_indices(encoded_indices(index_P - 1), spec, 8)
    with pytest.raises(InvalidInputError, match="codec 2 is not int32"):
        decode_indices(encode(torch.zeros(3), "fp32"), spec, 8)

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInputError, LimitExceededError
from node.averaging import pieces
from node.averaging.pieces import Incoming, TensorBuffers, cut, piece_codec, piece_message, values_of
from node.model.replica_state import TensorSchema
from protocol.limits import MAX_PIECE_BYTES
from protocol.tensors import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol import averaging_pb2 as pb
    from protocol.manifest import AveragingCodec, Codec

W_IN = TensorSchema("params.w_in", (4, 16, 8), torch.float32)
SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_PIECE_BYTES", 1024)


def values(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(SHAPES, st.sampled_from([torch.float32, torch.float64]))
def test_pieces_follow_each_other_and_cover_the_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    slots = cut([TensorSchema("params.w", shape, dtype)])
    assert [slot.offset for slot in slots] == [0, *(slot.end for slot in slots[:-1])]
    assert slots[-1].end == math.prod(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3_000_001,), (7, 300_001), (1, 1024, 1024, 2), (5, 400_000, 1)])
def test_no_piece_is_longer_than_its_limit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    slots = cut([TensorSchema("params.w", shape, dtype)])
    assert len(slots) > 1
    assert max(math.prod(slot.shape) * dtype.itemsize for slot in slots) <= MAX_PIECE_BYTES
    assert slots[-1].end == math.prod(shape)


def test_a_tensor_without_values_has_no_pieces() -> None:
    assert (
        cut([TensorSchema("params.w", (4, 0), torch.float32), TensorSchema("params.v", (0, 999_999), torch.float32)])
        == ()
    )


def test_rows_of_a_piece_are_the_last_dimension() -> None:
    (slot,) = cut([TensorSchema("params.w", (4, 3, 100), torch.float32)])
    assert slot.shape == (12, 100)


def test_short_last_dimensions_share_a_row_so_that_int8_has_few_scales() -> None:
    (slot,) = cut([TensorSchema("params.w", (4, 100, 1), torch.float32)])
    assert slot.shape == (4, 100)


def test_int8_keeps_one_scale_for_each_row() -> None:
    (slot,) = cut([TensorSchema("params.w", (2, 64), torch.float32)])
    x = values((2, 64)) * torch.tensor([[1e-6], [1e6]])
    back = values_of(piece_message(slot, x.view(-1), "int8").piece, slot, "int8").view(2, 64)
    assert bool(((back - x).abs() <= x.abs().amax(dim=1, keepdim=True) / 127).all())


@pytest.mark.parametrize(("codec", "error"), [("fp32", 0.0), ("bf16", 2**-7), ("int8", 4 / 127)])
@pytest.mark.usefixtures("small_pieces")
def test_a_tensor_comes_back_from_its_pieces(codec: Codec, error: float) -> None:
    x = values(W_IN.shape)
    store, incoming = TensorBuffers([W_IN]), Incoming(cut([W_IN]), codec, "fp32")  # type: ignore[arg-type]
    assert len(incoming.slots) == 2
    for slot in cut([W_IN]):
        place, values_V = incoming.take(piece_message(slot, slot.of({"params.w_in": x.view(-1)}), codec).piece)
        place.of(store.flat).copy_(values_V)
    assert incoming.done
    assert float((store.group("params")["w_in"] - x).abs().max()) <= error


def test_a_run_in_float64_loses_nothing_where_the_codec_is_fp32() -> None:
    (slot,) = cut([TensorSchema("params.w", (2, 64), torch.float64)])
    x = values((128,), dtype=torch.float64)
    codec = piece_codec(slot, "fp32", "fp64")
    assert torch.equal(values_of(piece_message(slot, x, codec).piece, slot, codec), x)


@pytest.mark.parametrize(("codec", "moments"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "bf16")])
def test_moments_never_go_in_int8(codec: AveragingCodec, moments: Codec) -> None:
    weights, second = cut([TensorSchema(name, (1, 64), torch.float32) for name in ("params.w", "second.w")])
    assert piece_codec(weights, codec, "fp32") == codec
    assert piece_codec(second, codec, "fp32") == moments


def test_a_store_holds_what_the_schema_says_by_group() -> None:
    store = TensorBuffers([W_IN, TensorSchema("first.w_in", (4, 2), torch.float64)])
    assert store.group("params")["w_in"].shape == (4, 16, 8)
    assert store.group("first")["w_in"].dtype == torch.float64
    assert store.group("second") == {}


def rehashed(piece: pb.Piece) -> None:
    piece.hash = pieces._hash(piece)


def lie_about_shape(piece: pb.Piece) -> None:
    piece.values.shape[:] = [2**31, 2**31]
    rehashed(piece)


def cut_bytes(piece: pb.Piece) -> None:
    piece.values.data = piece.values.data[:-4]
    rehashed(piece)


def overlong(piece: pb.Piece) -> None:
    piece.values.data += b"\0" * 4
    rehashed(piece)


def more_rows(piece: pb.Piece) -> None:
    piece.values.CopyFrom(encode(values((9, 128)), "fp32"))
    rehashed(piece)


def not_finite(piece: pb.Piece) -> None:
    piece.values.CopyFrom(encode(torch.full((4, 128), float("nan")), "fp32"))
    rehashed(piece)


def too_large(piece: pb.Piece) -> None:
    piece.values.CopyFrom(encode(torch.full((4, 128), 1e30), "fp32"))
    rehashed(piece)


def other_codec(piece: pb.Piece) -> None:
    piece.values.CopyFrom(encode(values((4, 128)), "bf16"))
    rehashed(piece)


def flip_a_byte(piece: pb.Piece) -> None:
    piece.values.data = bytes([piece.values.data[0] ^ 1]) + piece.values.data[1:]


def rename(piece: pb.Piece) -> None:
    piece.tensor = "params.other"


def move(piece: pb.Piece) -> None:
    piece.offset = 128


BAD: dict[str, tuple[Callable[[pb.Piece], None], str, str]] = {
    "unknown tensor": (rename, "tensor", "is 'params.other', must be 'params.w_in'"),
    "another place": (move, "params.w_in offset", "is 128, must be 0"),
    "another codec": (other_codec, "params.w_in codec", r"must be 2 \(fp32\)"),
    "a flipped byte": (flip_a_byte, "params.w_in hash", "does not fit the piece"),
    "a declared shape of exabytes": (
        lie_about_shape,
        "params.w_in",
        "shape is 2147483648 x 2147483648, must be 4 x 128",
    ),
    "too few bytes": (cut_bytes, "params.w_in", "has 2044 bytes, its shape needs 2048"),
    "too many bytes": (overlong, "params.w_in", "has 2052 bytes, its shape needs 2048"),
    "too many rows": (more_rows, "params.w_in", "shape is 9 x 128, must be 4 x 128"),
    "not finite": (not_finite, "params.w_in", "holds NaN or infinity"),
    "out of range": (too_large, "params.w_in magnitude", "the limit is"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_piece_is_refused_by_field(name: str) -> None:
    spoil, field, problem = BAD[name]
    (slot,) = cut([W_IN])
    piece = piece_message(slot, values(W_IN.shape).view(-1), "fp32").piece
    spoil(piece)
    with pytest.raises(InvalidInputError, match=problem) as caught:
        Incoming([slot], "fp32", "fp32").take(piece)
    assert caught.value.field == field


def test_pieces_out_of_order_or_too_many_are_refused(small_pieces: None) -> None:
    one, two = cut([W_IN])
    flat = {"params.w_in": values(W_IN.shape).view(-1)}
    first, second = (piece_message(slot, slot.of(flat), "fp32").piece for slot in (one, two))
    incoming = Incoming([one, two], "fp32", "fp32")
    with pytest.raises(InvalidInputError, match="offset: is 256, must be 0"):
        incoming.take(second)
    incoming.take(first)
    with pytest.raises(InvalidInputError, match="offset: is 0, must be 256"):
        incoming.take(first)
    incoming.take(second)
    with pytest.raises(InvalidInputError, match="no more pieces are due"):
        incoming.take(second)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_flipped_byte_of_a_piece_is_noticed(place: int, flip: int) -> None:
    (slot,) = cut([W_IN])
    piece = piece_message(slot, values(W_IN.shape).view(-1), "int8").piece
    for part in ("data", "scales"):
        spoilt = type(piece).FromString(piece.SerializeToString())
        raw = bytearray(getattr(spoilt.values, part))
        raw[place % len(raw)] ^= flip
        setattr(spoilt.values, part, bytes(raw))
        with pytest.raises(InvalidInputError, match="hash: does not fit"):
            values_of(spoilt, slot, "int8")


def test_a_value_out_of_range_is_a_limit_exceeded() -> None:
    (slot,) = cut([W_IN])
    piece = piece_message(slot, torch.full((512,), 1e30), "fp32").piece
    with pytest.raises(LimitExceededError, match=r"params\.w_in magnitude"):
        values_of(piece, slot, "fp32")

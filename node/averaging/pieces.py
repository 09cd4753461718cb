"""Tensors as pieces with a hash each, and back: how averaging and downloads move whole replicas in bounded messages.

Both sides cut a schema alike, so a receiver knows the name, place and size of every piece before the first one comes:
nothing is allocated or written on a peer's word.

Shapes: R rows, ... the parameter's own shape; V values of one piece, flattened.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import xxhash

from common.errors import InvalidInputError
from protocol import averaging_pb2 as pb
from protocol.limits import MAX_PIECE_BYTES
from protocol.tensors import CODECS, TensorSpec, decode, encode_into, is_lossless

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from node.model.replica_state import TensorSchema
    from protocol.manifest import AveragingCodec, Codec, Dtype

MIN_COLUMNS = 64
"""int8 has one scale of four bytes for each row of columns: short last dimensions are taken together."""

PARAMS = "params."


class Slot(NamedTuple):
    """Where one piece belongs: `shape` is (rows, columns), or (values,) of a row too long for one piece."""

    tensor: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """One past its last value in the flattened tensor."""
        return self.offset + math.prod(self.shape)

    @property
    def is_weights(self) -> bool:
        """Whether it is of the parameters, not of the moments."""
        return self.tensor.startswith(PARAMS)

    def of(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Its values [V] in flattened tensors: a view."""
        return flat[self.tensor][self.offset : self.end]


def wanted_tensors(tensors: Iterable[TensorSchema], *, params_only: bool) -> list[TensorSchema]:
    """Return the tensors that a download sends, in the order in which it sends them."""
    return [t for t in sorted(tensors) if t.name.startswith(PARAMS) or not params_only]


def cut(tensors: Iterable[TensorSchema]) -> tuple[Slot, ...]:
    """The pieces of tensors, in the order in which they are sent."""
    return tuple(slot for tensor in tensors for slot in _cut_one(tensor))


def piece_codec(slot: Slot, codec: AveragingCodec, dtype: Dtype) -> Codec:
    """Codec of a piece in an exchange: moments never go in int8, whose absmax scale would zero small squares."""
    if codec == "fp32":
        return dtype
    return codec if slot.is_weights else "bf16"


def piece_message(slot: Slot, values_V: torch.Tensor, codec: Codec) -> pb.ExchangeMessage:
    """Message for a slot's values."""
    message = pb.ExchangeMessage()
    piece = message.piece
    piece.tensor, piece.offset = slot.tensor, slot.offset
    encode_into(piece.values, values_V.view(slot.shape), codec)
    piece.hash = _hash(piece)
    return message


def sent_as(slot: Slot, values_V: torch.Tensor, codec: Codec) -> tuple[bytes, torch.Tensor]:
    """A slot's values as bytes to send, and as they are read there: the same tensor where the codec loses nothing."""
    message = piece_message(slot, values_V, codec)
    lossless = is_lossless(codec, slot.dtype)
    return message.SerializeToString(), values_V if lossless else _decoded(message.piece, slot)


def values_of(piece: pb.Piece, slot: Slot, codec: Codec) -> torch.Tensor:
    """Values [V] of the piece that must come now, in the slot's type.

    Raises:
        InvalidInputError: another tensor, place, codec, shape or length, a hash that does not fit, not finite.
    """
    if piece.tensor != slot.tensor:
        raise InvalidInputError("tensor", f"is {piece.tensor[:100]!r}, must be {slot.tensor!r}")
    if piece.offset != slot.offset:
        raise InvalidInputError(f"{slot.tensor} offset", f"is {piece.offset}, must be {slot.offset}")
    if piece.values.codec != CODECS[codec]:
        raise InvalidInputError(f"{slot.tensor} codec", f"is {piece.values.codec}, must be {CODECS[codec]} ({codec})")
    if piece.hash != _hash(piece):
        raise InvalidInputError(f"{slot.tensor} hash", "does not fit the piece")
    return _decoded(piece, slot)


class Incoming:
    """Checks that pieces are exactly `slots`, in their order; the first `taken` of them have come before."""

    def __init__(self, slots: Iterable[Slot], codec: AveragingCodec, dtype: Dtype, taken: int = 0) -> None:
        self.slots = tuple(slots)
        self.taken = taken
        self._codec, self._dtype = codec, dtype

    @property
    def done(self) -> bool:
        """Whether every piece has come."""
        return self.taken == len(self.slots)

    def take(self, piece: pb.Piece) -> tuple[Slot, torch.Tensor]:
        """The next slot and its values [V]; raises InvalidInputError like `values_of`."""
        if self.done:
            raise InvalidInputError("tensor", f"is {piece.tensor[:100]!r}, but no more pieces are due")
        slot = self.slots[self.taken]
        values_V = values_of(piece, slot, piece_codec(slot, self._codec, self._dtype))
        self.taken += 1
        return slot, values_V


class TensorBuffers:
    """Memory for the tensors of a schema, and for nothing else: `flat` by name, filled slot by slot."""

    def __init__(self, tensors: Sequence[TensorSchema]) -> None:
        self._shapes = {tensor.name: tensor.shape for tensor in tensors}
        # Not set to zero: pages are only taken up as pieces arrive.
        self.flat = {tensor.name: torch.empty(math.prod(tensor.shape), dtype=tensor.dtype) for tensor in tensors}

    def group(self, group: str) -> dict[str, torch.Tensor]:
        """Tensors [R, ...] of `params`, `first` or `second`, without the group's name; valid once all pieces came."""
        return {
            name.removeprefix(f"{group}."): self.flat[name].view(shape)
            for name, shape in self._shapes.items()
            if name.startswith(f"{group}.")
        }


def flattened(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor as a vector, in which a slot's place can be found."""
    return {name: t.reshape(-1) for name, t in tensors.items()}


def _cut_one(tensor: TensorSchema) -> Iterator[Slot]:
    n_values, most = math.prod(tensor.shape), MAX_PIECE_BYTES // tensor.dtype.itemsize
    columns = _n_columns(tensor.shape)
    step = most if columns > most else most // columns * columns
    for offset in range(0, n_values, step):
        size = min(step, n_values - offset)
        shape = (size,) if columns > most else (size // columns, columns)
        yield Slot(tensor.name, offset, shape, tensor.dtype)


def _n_columns(shape: tuple[int, ...]) -> int:
    columns = 1
    for size in reversed(shape):
        if columns >= MIN_COLUMNS:
            break
        columns *= max(size, 1)
    return columns


def _decoded(piece: pb.Piece, slot: Slot) -> torch.Tensor:
    return decode(piece.values, TensorSpec(field=slot.tensor, shape=slot.shape), slot.dtype).view(-1)


def _hash(piece: pb.Piece) -> bytes:
    # Its sender made it: it can find accidents and no lies, so a quick hash serves as well as a cryptographic one.
    values, digest = piece.values, xxhash.xxh3_128()
    shape = "x".join(map(str, values.shape))
    digest.update(f"{piece.tensor} {piece.offset} {int(values.codec)} {shape} ".encode())
    digest.update(values.data)
    digest.update(values.scales)
    return digest.digest()

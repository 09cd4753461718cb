"""Keys and values of the tokens that a model has read, so that generation reads each token once. No sockets.

Several sequences are read at once, each from where it stands. The tokens of a pass are packed, one after the other and
without padding, so that a layer's experts get them in one call and get nothing else. Attention alone is computed per
sequence, over that sequence's own keys: what stands in others has no part in it.
"""

# Shapes: B sequences of the cache, R those that a pass reads, N tokens of a pass, T the most of one sequence,
#         P positions of the cache, S those of a pass, W tokens of a sequence that are embedded, A attention heads,
#         C channels of a head, D d_model, Q heads of the gate, X = R * W, V vocabulary.

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.errors import LimitExceededError
from node.model.rope import rope_rotation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from node.model.transformer import Attend, Transformer

MAX_CACHE_BYTES = 1 << 32
"""Keys and values of all sequences and layers together; more sequences are refused."""


def bytes_per_sequence(model: Transformer, n_positions: int) -> int:
    """What the keys and values of one window of `n_positions` tokens take in all layers together."""
    like = model.embedding_VD
    return 2 * len(model.layers) * n_positions * like.shape[1] * like.element_size()


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What a pass reads of one sequence: the ids of `window` from position `start` to before position `stop`.

    `place` is the sequence's in the cache. Position 0 is the window's first token, and nothing is before it; the tokens
    before `start` have been read.
    """

    place: int
    window: Sequence[int]
    start: int
    stop: int


def places_of(stretches: Sequence[Stretch]) -> slice | list[int]:
    """Index of the places of all stretches: where each follows the one before, a slice, by which nothing is copied."""
    places = [of.place for of in stretches]
    run = range(places[0], places[0] + len(places))
    return slice(run.start, run.stop) if places == list(run) else places


class KeptSequences(ABC):
    """Places for `n_places` sequences, of which the first `n_sequences` are taken; what is kept of each is in tensors.

    What is written for a position replaces what was there, so that a pass that failed on its way can be repeated.
    """

    def __init__(self, n_places: int, n_sequences: int, each_bytes: int) -> None:
        """LimitExceededError for places that take more than MAX_CACHE_BYTES."""
        if n_places * each_bytes > MAX_CACHE_BYTES:
            why = f"their keys and values take {each_bytes:,} bytes each, and {MAX_CACHE_BYTES:,} in all are the most"
            raise LimitExceededError("sequences", n_places, MAX_CACHE_BYTES // each_bytes, why)
        self.n_places, self.n_sequences = n_places, n_sequences

    @abstractmethod
    def tensors(self) -> Iterable[Tensor]:
        """Return all that is kept; the first dimension is the place."""

    def add(self) -> int:
        """Take the next place, as empty as at the start; LimitExceededError if there is none left."""
        if self.n_sequences == self.n_places:
            raise LimitExceededError("sequences", self.n_sequences + 1, self.n_places)
        place = self.n_sequences
        # What is not finite there would spoil sums in which it has no weight.
        for kept_B in self.tensors():
            kept_B[place] = 0
        self.n_sequences += 1
        return place

    def keep(self, places: Sequence[int]) -> None:
        """Give up all places but these, which become places 0, 1, ... in the order that is given."""
        moved = [(to, place) for to, place in enumerate(places) if to != place]
        if moved:
            to, place = (list(column) for column in zip(*moved, strict=True))
            for kept_B in self.tensors():
                kept_B[to] = kept_B[place]
        self.n_sequences = len(places)


class AttentionCache(KeptSequences):
    """Room for the keys, after their rotation, and the values of `n_places` windows of up to `n_positions` tokens.

    All places are taken, unless `n_sequences` says how many are.
    """

    def __init__(self, model: Transformer, n_places: int, n_positions: int, n_sequences: int | None = None) -> None:
        super().__init__(
            n_places, n_places if n_sequences is None else n_sequences, bytes_per_sequence(model, n_positions)
        )
        like = model.embedding_VD
        shape = (n_places, like.shape[1] // model.channels, n_positions, model.channels)
        self._keys_BAPC = [like.new_zeros(shape) for _ in model.layers]
        self._values_BAPC = [like.new_zeros(shape) for _ in model.layers]
        self.rotation_PC = rope_rotation(n_positions, model.channels, like)

    def tensors(self) -> Iterable[Tensor]:
        """Keys and values of each layer."""
        return (*self._keys_BAPC, *self._values_BAPC)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, A, P, C]; may be written to."""
        return self._keys_BAPC[layer][: self.n_sequences], self._values_BAPC[layer][: self.n_sequences]


class Pass:
    """Where each token of a pass belongs: its stretch, its column there, its position in the window.

    `rotation` is that of each token, as `rotate` takes it for N sequences of one token.
    """

    def __init__(self, cache: AttentionCache, stretches: Sequence[Stretch]) -> None:
        self._cache = cache
        device = cache.rotation_PC[0].device
        place_R, start_R, stop_R = torch.tensor(
            [(of.place, of.start, of.stop) for of in stretches], device=device
        ).unbind(1)
        length_R = stop_R - start_R
        self.last_R = length_R.cumsum(0) - 1
        self.stretch_N = torch.repeat_interleave(length_R)
        self.column_N = torch.arange(len(self.stretch_N), device=device) - (self.last_R + 1 - length_R)[self.stretch_N]
        self.position_N = start_R[self.stretch_N] + self.column_N
        self._place_N = place_R[self.stretch_N]
        cos_PC, sin_PC = cache.rotation_PC
        self.rotation = (cos_PC[self.position_N, None, None], sin_PC[self.position_N, None, None])
        self._places = places_of(stretches)
        self._shape = (len(stretches), max(of.stop - of.start for of in stretches))
        self._n_seen = max(of.stop for of in stretches)
        position_RT = start_R[:, None] + torch.arange(self._shape[1], device=device)
        self._sees_R1TS = (torch.arange(self._n_seen, device=device) <= position_RT[:, :, None])[:, None]

    def attend(self, layer: int) -> Attend:
        """What tokens see in this layer: those of their sequence that are in the cache, and themselves."""
        keys_BAPC, values_BAPC = self._cache.of_layer(layer)

        def attend(query_NA1C: Tensor, key_NA1C: Tensor, value_NA1C: Tensor) -> Tensor:
            keys_BAPC[self._place_N, :, self.position_N] = key_NA1C[:, :, 0]
            values_BAPC[self._place_N, :, self.position_N] = value_NA1C[:, :, 0]
            query_RTAC = query_NA1C.new_zeros(*self._shape, *query_NA1C.shape[1::2])
            query_RTAC[self.stretch_N, self.column_N] = query_NA1C[:, :, 0]
            mixed_RATC = F.scaled_dot_product_attention(
                query_RTAC.transpose(1, 2),
                keys_BAPC[self._places, :, : self._n_seen],
                values_BAPC[self._places, :, : self._n_seen],
                attn_mask=self._sees_R1TS,
            )
            return mixed_RATC[self.stretch_N, :, self.column_N, None]

        return attend


@torch.no_grad()
def read(model: Transformer, cache: AttentionCache, stretches: Sequence[Stretch]) -> Tensor:
    """Logits [R, V] of what follows each stretch; the cache then has its keys and values.

    They are those of `model(window[:stop])`, with each layer called once for the tokens of all stretches. What the
    experts raise, TooFewExpertsError for one, leaves a cache for which the same pass can be repeated.
    """
    at = Pass(cache, stretches)
    x_ND, code_NQD = _embedded(model, stretches, at)
    # To a layer they are N sequences of one token each; `attend` knows which of them belong together.
    x_N1D = x_ND[:, None]
    for index, layer in enumerate(model.layers):
        x_N1D = layer(x_N1D, at.rotation, code_NQD, at.attend(index))
    return model.logits(x_N1D[at.last_R, 0])


def _embedded(model: Transformer, stretches: Sequence[Stretch], at: Pass) -> tuple[Tensor, Tensor | None]:
    """What the first layer [N, D] and the gates [N, Q, D] read, of a token and those before it in its window.

    Windows of different lengths are padded behind their ends, where nothing that is read looks.
    """
    device = model.embedding_VD.device
    firsts = [max(0, of.start - model.n_back) for of in stretches]
    windows = [torch.tensor(of.window[first : of.stop]) for of, first in zip(stretches, firsts, strict=True)]
    ids_RW = pad_sequence(windows, batch_first=True).to(device)
    x_RWD, code_XQD = model.embedded(ids_RW)
    known_R = torch.tensor([of.start - first for of, first in zip(stretches, firsts, strict=True)], device=device)
    column_N = at.column_N + known_R[at.stretch_N]
    x_ND = x_RWD[at.stretch_N, column_N]
    return x_ND, None if code_XQD is None else code_XQD.unflatten(0, ids_RW.shape)[at.stretch_N, column_N]

"""Keys and values of the tokens that a pretrained model has read, so that generation reads each token once.

Several sequences are read in one pass, each from where it stands, padded behind their ends; where that would be much
padding, as when one has a long prompt and others have a token each, in several passes. What is padding is written
nowhere, seen by no token, and sent to no expert (`pretrained.FfnWithExperts`).
"""

# Shapes: B sequences of the cache, R those that a pass reads, T the most tokens that it reads of one, N all of them,
#         P positions of the cache, S those of a pass, K heads of keys and values, C channels of a head.

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import torch
from transformers.cache_utils import Cache

from common.errors import DataError
from node.model.attention_cache import KeptSequences, places_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from node.model.attention_cache import Stretch


FREE_PADDING: Final = 48
"""So many tokens cost less than another pass, which reads all weights of the model from memory."""
PADDED_PART: Final = 4
"""A pass may be padded by a fourth of what is longest in it, for each of its stretches."""

FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")
"""What the library calls layers that see all tokens before, and layers that see the last ones."""


def bytes_per_sequence(language_model: PreTrainedModel, n_positions: int) -> int:
    """What the keys and values of one window of `n_positions` tokens take in all layers together."""
    n_heads, channels = _heads_and_channels(language_model)
    n_layers: int = language_model.config.get_text_config().num_hidden_layers
    return 2 * n_layers * n_heads * n_positions * channels * language_model.dtype.itemsize


def _heads_and_channels(language_model: PreTrainedModel) -> tuple[int, int]:
    config = language_model.config.get_text_config()
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return n_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _types_and_reach(language_model: PreTrainedModel) -> tuple[frozenset[str], int | None]:
    """The types of the layers, where the model has several; how many tokens a sliding one sees, None if all.

    DataError for a type of which more must be kept than keys and values, or that sees others.
    """
    config = language_model.config.get_text_config()
    types = frozenset(getattr(config, "layer_types", None) or ())
    if unknown := sorted(types - set(LAYER_TYPES)):
        raise DataError(
            f"the pretrained model has layers of type {unknown[0]}, with which it can be trained on, but not write "
            f"text here; those of type {' and '.join(LAYER_TYPES)} can"
        )
    return types, getattr(config, "sliding_window", None)


class PretrainedCache(KeptSequences):
    """Room for the keys and values of `n_places` windows of up to `n_positions` tokens; no place is taken yet.

    A layer that sees the last tokens only has the same room: no window is longer than the model's context.
    """

    def __init__(self, language_model: PreTrainedModel, n_places: int, n_positions: int) -> None:
        """DataError where the model has layers of a type that cannot be read so."""
        self._types, self._reach = _types_and_reach(language_model)
        super().__init__(n_places, 0, bytes_per_sequence(language_model, n_positions))
        n_heads, channels = _heads_and_channels(language_model)
        self._shape = (n_places, n_heads, n_positions, channels)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def tensors(self) -> Iterable[Tensor]:
        """Keys and values of each layer that has been read."""
        return itertools.chain(*self._layers.values())

    def masks(self, position_RT: Tensor, n_seen: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """What is added to attention's logits [R, 1, T, S], as the model takes it: by type of layer if those differ."""
        if self._reach is None or self._reach >= n_seen:
            return _mask(position_RT, n_seen, None, dtype)
        sliding = _mask(position_RT, n_seen, self._reach, dtype)
        if not self._types:
            return sliding
        return {FULL: _mask(position_RT, n_seen, None, dtype), SLIDING: sliding}

    def of_layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, P, C]; may be written to."""
        if layer not in self._layers:
            self._layers[layer] = (like.new_zeros(self._shape), like.new_zeros(self._shape))
        return self._layers[layer]


def _mask(position_RT: Tensor, n_seen: int, reach: int | None, dtype: torch.dtype) -> Tensor:
    """[R, 1, T, S]: the lowest number where a token may not look; it sees `reach` tokens, itself counted."""
    position_S = torch.arange(n_seen, device=position_RT.device)
    sees_RTS = position_S <= position_RT[:, :, None]
    if reach is not None:
        sees_RTS &= position_S > position_RT[:, :, None] - reach
    hidden = torch.finfo(dtype).min
    return torch.zeros((), dtype=dtype, device=sees_RTS.device).where(sees_RTS, hidden)[:, None]


def passes_of(stretches: Sequence[Stretch]) -> list[list[int]]:
    """Which stretches are read in one pass, by their indices: those that are padded by little."""
    lengths = [of.stop - of.start for of in stretches]
    groups: list[list[int]] = []
    n_padding = longest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        n_padding += longest - lengths[index]
        if not groups or n_padding > max(FREE_PADDING, longest * len(groups[-1]) // PADDED_PART):
            groups.append([])
            longest, n_padding = lengths[index], 0
        groups[-1].append(index)
    return [sorted(group) for group in groups]


class PretrainedPass(Cache):
    """What the model's layers take for their cache during one pass, and where each token of it belongs."""

    def __init__(self, cache: PretrainedCache, stretches: Sequence[Stretch], device: torch.device) -> None:
        super().__init__(layers=[])
        self._cache = cache
        place_R, start_R, stop_R = torch.tensor(
            [(of.place, of.start, of.stop) for of in stretches], device=device
        ).unbind(1)
        self.length_R = stop_R - start_R
        column_T = torch.arange(int(self.length_R.max()), device=device)
        self.is_token_RT = column_T < self.length_R[:, None]
        self.position_RT = (start_R[:, None] + column_T).minimum(stop_R[:, None] - 1)
        self._row_N, self._column_N = self.is_token_RT.nonzero(as_tuple=True)
        self._place_N, self._position_N = place_R[self._row_N], self.position_RT[self._row_N, self._column_N]
        self._places = places_of(stretches)
        self._n_seen = int(stop_R.max())

    def masks(self, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """What is added to attention's logits: a token sees those of its sequence up to itself."""
        return self._cache.masks(self.position_RT, self._n_seen, dtype)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: object,
        **_kwargs: object,  # of layers that this cache has no use for
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [R, K, T, C], and return all that the pass sees [R, K, S, C]."""
        kept = self._cache.of_layer(layer_idx, key_states)
        for all_BKPC, new_RKTC in zip(kept, (key_states, value_states), strict=True):
            all_BKPC[self._place_N, :, self._position_N] = new_RKTC[self._row_N, :, self._column_N]
        keys_BKPC, values_BKPC = kept
        return keys_BKPC[self._places, :, : self._n_seen], values_BKPC[self._places, :, : self._n_seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the library's name
        """Return 0, since the model is given positions and mask and need not count."""
        return 0

"""What the frozen layers below the first one with experts give for a text: computed once, kept while it fits.

Path of a step: data -> **pretrained** -> gate -> dispatch -> hosts. Held-out text is read at every evaluation,
training text in every epoch; both come back as they were.
"""

# Shapes: B sequences, T positions, D width of the model.

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

MAX_KEPT_BYTES: Final = 1 << 30
CHECKED_TOKENS: Final = 8
TOLERANCE: Final = 1e-4
"""How much of the largest logit the two ways may differ by: rounding, and not another computation."""


class FrozenStates:
    """States [T, D] of sequences by their tokens; those that were used longest ago go first. Any thread may use it."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, ids_BT: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """States [B, T, D]; `compute` gives those [b, T, D] of the sequences [b, T] that are not kept."""
        keys = _keys(ids_BT)
        with self._lock:
            known = {key: self._kept[key] for key in keys if key in self._kept}
            for key in known:
                self._kept.move_to_end(key)
        missing = [row for row, key in enumerate(keys) if key not in known]
        if missing:
            x_BTD = compute(ids_BT[missing])
            self.keep(ids_BT[missing], x_BTD)
            known |= zip([keys[row] for row in missing], x_BTD, strict=True)
        return torch.stack([known[key] for key in keys])

    def keep(self, ids_BT: Tensor, x_BTD: Tensor) -> None:
        """Have states that were computed elsewhere, such as in an earlier process."""
        for key, state_TD in zip(_keys(ids_BT), x_BTD, strict=True):
            self._keep(key, state_TD)

    def _keep(self, key: bytes, state_TD: Tensor) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = state_TD.clone()  # alone: a view would keep its whole batch
                self._n_bytes += state_TD.nbytes
            while self._n_bytes > self._max_bytes:
                self._n_bytes -= self._kept.popitem(last=False)[1].nbytes


def _keys(ids_BT: Tensor) -> list[bytes]:
    return [row_T.numpy().tobytes() for row_T in ids_BT.cpu()]


class SplitModel:
    """A model in two parts at layer `first`: below, which gives states, and from there on, which takes them.

    The upper part is a copy of the modules around the same layers.
    """

    def __init__(self, language_model: PreTrainedModel, layers: nn.ModuleList, first: int) -> None:
        self._whole, self._layers, self._first = language_model, layers, first
        self._upper = _with_layers(language_model, layers, first)
        self._seen = threading.local()
        layers[first].register_forward_pre_hook(self._see, with_kwargs=True)

    def to(self, device: torch.device) -> None:
        """Have the upper part where the whole is: what is no weight, it has for itself."""
        nn.Module.to(self._upper, device)

    def works(self) -> bool:
        """Whether both parts together say what the whole model says, which is tried; experts must add nothing now.

        A model whose layers are of several kinds tells them by their numbers, which are others in the upper part: a
        short text would not show it.
        """
        if len(set(getattr(self._whole.config.get_text_config(), "layer_types", None) or ())) > 1:
            return False
        ids_BT = torch.arange(CHECKED_TOKENS)[None].to(self._whole.device)
        with torch.no_grad():
            try:
                expected = self._whole(input_ids=ids_BT, use_cache=False).logits
                found = self.logits(self.states(ids_BT))
            except (RuntimeError, ValueError, TypeError, AttributeError, _LowerDoneError):
                return False
        return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())

    @torch.no_grad()
    def states(self, ids_BT: Tensor) -> Tensor:
        """What enters layer `first`, [B, T, D]; nothing from there on is computed."""
        self._seen.wanted = True
        try:
            self._whole(input_ids=ids_BT, use_cache=False)
        except _LowerDoneError as done:
            return done.x_BTD
        finally:
            self._seen.wanted = False
        raise RuntimeError("the model did not come to the first layer with experts")

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] of what enters layer `first`."""
        logits_BTV: Tensor = self._upper(inputs_embeds=x_BTD, use_cache=False).logits
        return logits_BTV

    def _see(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(self._seen, "wanted", False):
            raise _LowerDoneError(args[0] if args else kwargs["hidden_states"])


class _LowerDoneError(Exception):
    """Ends a forward before the first layer with experts, and brings along what enters it."""

    def __init__(self, x_BTD: Tensor) -> None:
        super().__init__()
        self.x_BTD = x_BTD


def _with_layers(language_model: PreTrainedModel, layers: nn.ModuleList, first: int) -> PreTrainedModel:
    """A copy of the modules that shares weights and layers, without the layers before `first`."""
    shared = [*language_model.parameters(), *language_model.buffers(), *layers]
    upper = copy.deepcopy(language_model, {id(part): part for part in shared})
    name = next(name for name, part in language_model.named_modules() if part is layers)
    owner, _, last = name.rpartition(".")
    setattr(upper.get_submodule(owner), last, nn.ModuleList(layers[first:]))
    return upper

"""A pretrained language model as the trunk: frozen, with the run's experts beside the FFNs of some of its layers.

Path of a step: data -> **pretrained** -> gate -> dispatch -> hosts, and back. Any causal model that `transformers`
loads will do whose decoder layers call a feed-forward module named like one of FEED_FORWARD.

What is trained is small, gates and what the run unfreezes, and it alone is in `parameters()`, `state_dict()` and so in
checkpoints and averaging. The frozen weights are the files that the manifest names; trunks of one process share them.
"""

# Shapes: B sequences, T positions of a sequence, N = B * T tokens, D width of the model, V vocabulary, Q gate heads.

from __future__ import annotations

import copy
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.errors import DataError, InvalidInputError
from node.model.frozen_states import FrozenStates, SplitModel
from node.model.pretrained_cache import PretrainedCache, PretrainedPass, bytes_per_sequence, passes_of
from node.model.token_codes import TokenCodes
from node.model.trunk import Trunk
from protocol.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Self

    from transformers import PreTrainedModel

    from node.model.attention_cache import Stretch
    from protocol.manifest import Manifest

FEED_FORWARD: Final = ("mlp", "feed_forward", "ffn")
MATRIX_DIMS = 2


class FfnWithExperts(nn.Module):
    """A frozen feed-forward part and, added to what it gives, the experts that a gate chooses by what it reads."""

    def __init__(self, ffn: nn.Module, moe: nn.Module, tokens: _TokensOfForward, dtype: torch.dtype) -> None:
        super().__init__()
        self.ffn, self.moe, self._tokens, self._dtype = ffn, moe, tokens, dtype

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> [B, T, D]; experts get what is no padding, and add nothing to what is."""
        y_BTD: Tensor = self.ffn(x_BTD)
        if not self._tokens.experts:
            return y_BTD
        is_token_BT, code_NQD = self._tokens.is_token_BT, self._tokens.code_NQD
        x_ND = (x_BTD.flatten(0, 1) if is_token_BT is None else x_BTD[is_token_BT]).to(self._dtype)
        added_ND: Tensor = self.moe(x_ND) if code_NQD is None else self.moe(x_ND, code_NQD)
        added_ND = added_ND.to(y_BTD.dtype)
        if is_token_BT is None:
            return y_BTD + added_ND.view_as(y_BTD)
        return y_BTD.index_put(is_token_BT.nonzero(as_tuple=True), added_ND, accumulate=True)


class _TokensOfForward(threading.local):
    """What experts have to know of the forward of this thread: layers of another's model pass nothing on but x.

    Which positions are tokens, None if all; and the codes that gates choose by, None if they choose by x. Without
    `experts` the model is as it was.
    """

    experts: bool = True

    is_token_BT: Tensor | None = None
    code_NQD: Tensor | None = None


class PretrainedTrunk(Trunk):
    """Tokens in, logits of the next token out; `moe_layers[i]` stands beside the FFN of layer `attach[i]`.

    `language_model` is shared, not changed: this trunk is a copy of its modules with the same weights. It may be an
    outline (`pretrained_outline.py`): then the trunk holds what is trained and computes nothing.
    """

    def __init__(
        self,
        manifest: Manifest,
        language_model: PreTrainedModel,
        moe_layers: Sequence[nn.Module],
        generator: torch.Generator,
        states: FrozenStates | None = None,
    ) -> None:
        """DataError where the model and the manifest do not fit each other, naming what differs.

        Trunks of one model whose experts begin in the same layer may share `states`.
        """
        super().__init__()
        check_fit(manifest, language_model)
        self.context, self.vocab_size = manifest.model.context, manifest.model.vocab_size
        self.moe_layers = nn.ModuleList(moe_layers)
        self.codes = TokenCodes(manifest.model, generator) if manifest.model.gate_reads == "tokens" else None
        self._tokens = _TokensOfForward()
        self.register_buffer("_place", torch.empty(0), persistent=False)
        frozen = sharing_weights(language_model)
        frozen.train(mode=False)
        for parameter in frozen.parameters():
            parameter.requires_grad = False
        unfrozen = _unfrozen(frozen, manifest.pretrained.unfreeze)
        self._unfrozen, self._unfrozen_names = nn.ParameterList(unfrozen.values()), tuple(unfrozen)
        layers, dtype = decoder_layers(frozen), DTYPES[manifest.dtype]
        for number, moe in zip(manifest.pretrained.attach, moe_layers, strict=True):
            name = feed_forward_name(layers[number])
            ffn = FfnWithExperts(getattr(layers[number], name), moe, self._tokens, dtype)
            setattr(layers[number], name, ffn)
        self._states, self._split = FrozenStates() if states is None else states, None
        self._is_outline = is_outline(language_model)
        if manifest.pretrained.attach[0] and not self._unfrozen and not self._is_outline:
            split = SplitModel(frozen, layers, manifest.pretrained.attach[0])
            with self._of_forward(None, None, experts=False):
                self._split = split if split.works() else None
        self._frozen: tuple[PreTrainedModel] = (frozen,)  # in a tuple it is none of this module's own parts

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.get_buffer("_place").device

    @property
    def unfrozen(self) -> Mapping[str, nn.Parameter]:
        """What is trained of the pretrained model, by the names that it has there."""
        return dict(zip(self._unfrozen_names, self._unfrozen, strict=True))

    @property
    def language_model(self) -> PreTrainedModel:
        """The model with the experts in it, as `transformers` has it."""
        return self._frozen[0]

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Integer ids_BT in [0, V), T <= context -> logits_BTV. InvalidInputError when T does not fit the context."""
        if ids_BT.dim() != MATRIX_DIMS or not 0 < ids_BT.shape[1] <= self.context:
            shape = tuple(ids_BT.shape)
            raise InvalidInputError("ids_BT", f"has shape {shape}; it takes (sequences, 1 to {self.context} tokens)")
        ids_BT = ids_BT.long()
        with self._of_forward(None, None if self.codes is None else self.codes(ids_BT)):
            if self._split is None:
                logits_BTV: Tensor = self.language_model(input_ids=ids_BT, use_cache=False).logits
            else:
                logits_BTV = self._split.logits(self._states.of(ids_BT, self._split.states))
        return logits_BTV.float()

    def new_cache(self, n_places: int, n_positions: int) -> PretrainedCache:
        """Room for what is read of so many sequences, all of it free; LimitExceededError for too many.

        DataError for a model that has layers of a type that cannot be read token by token.
        """
        return PretrainedCache(self.language_model, n_places, n_positions)

    def bytes_per_sequence(self, n_positions: int) -> int:
        """What the keys and values of one window of so many tokens take."""
        return bytes_per_sequence(self.language_model, n_positions)

    @torch.no_grad()
    def read(self, cache: PretrainedCache, stretches: Sequence[Stretch]) -> Tensor:
        """Logits [R, V] of what follows each stretch, in one pass or, where much would be padding, in several.

        What the experts raise an error in can be repeated, all of it.
        """
        groups = passes_of(stretches)
        if len(groups) == 1:
            return self._read_together(cache, stretches)
        logits_RV = torch.empty(len(stretches), self.vocab_size, device=self.device)
        for group in groups:
            logits_RV[group] = self._read_together(cache, [stretches[index] for index in group])
        return logits_RV

    def _read_together(self, cache: PretrainedCache, stretches: Sequence[Stretch]) -> Tensor:
        at = PretrainedPass(cache, stretches, self.device)
        ids_RT = _padded([of.window[of.start : of.stop] for of in stretches], self.device)
        last_R = at.length_R - 1
        wanted_W, of_R = last_R.unique(return_inverse=True)
        with self._of_forward(at.is_token_RT, self._codes_of(stretches, at)):
            logits_RWV: Tensor = self.language_model(
                input_ids=ids_RT,
                position_ids=at.position_RT,
                attention_mask=at.masks(self.language_model.dtype),
                cache=at,
                use_cache=True,
                logits_to_keep=wanted_W,
            ).logits
        return logits_RWV[torch.arange(len(of_R), device=self.device), of_R].float()

    def _codes_of(self, stretches: Sequence[Stretch], at: PretrainedPass) -> Tensor | None:
        """Codes [N, Q, D] of the tokens of a pass, which are of those before them in their windows too."""
        if self.codes is None:
            return None
        n_back = self.codes.n_back
        firsts = [max(0, of.start - n_back) for of in stretches]
        windows = [of.window[first : of.stop] for of, first in zip(stretches, firsts, strict=True)]
        ids_RW = _padded(windows, self.device)
        known_R = torch.tensor([of.start - first for of, first in zip(stretches, firsts, strict=True)])
        row_N, column_N = at.is_token_RT.nonzero(as_tuple=True)
        codes_RWQD: Tensor = self.codes(ids_RW).unflatten(0, ids_RW.shape)
        return codes_RWQD[row_N, column_N + known_R.to(self.device)[row_N]]

    @contextmanager
    def _of_forward(
        self, is_token_BT: Tensor | None, code_NQD: Tensor | None, *, experts: bool = True
    ) -> Iterator[None]:
        tokens = self._tokens
        tokens.is_token_BT, tokens.code_NQD, tokens.experts = is_token_BT, code_NQD, experts
        try:
            yield
        finally:
            tokens.is_token_BT, tokens.code_NQD, tokens.experts = None, None, True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the frozen weights along to a device; their type stays that of the manifest."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self._is_outline:
            nn.Module.to(self.language_model, self.device)
        if self._split is not None:
            self._split.to(self.device)
        return self


def _padded(windows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return pad_sequence([torch.tensor(window) for window in windows], batch_first=True).to(device)


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, in their order. DataError for a model in which they cannot be told."""
    count = language_model.config.get_text_config().num_hidden_layers
    lists = [part for part in language_model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    found = [part for part in lists if all(feed_forward_name(layer) for layer in part)]
    if len(found) != 1:
        kind = type(language_model).__name__
        raise DataError(
            f"the layers of {kind} cannot be told: experts go beside a part of each layer that is named "
            f"{' or '.join(FEED_FORWARD)}, and it has {len(found)} lists of {count} such layers; take another model"
        )
    return found[0]


def feed_forward_name(layer: nn.Module) -> str:
    """What the layer calls its feed-forward part; empty if it has none."""
    return next((name for name in FEED_FORWARD if isinstance(getattr(layer, name, None), nn.Module)), "")


def feed_forward_paths(language_model: PreTrainedModel, numbers: Sequence[int]) -> list[str]:
    """Where the feed-forward parts of these layers are among the model's modules."""
    layers = decoder_layers(language_model)
    path = next(path for path, part in language_model.named_modules() if part is layers)
    return [f"{path}.{number}.{feed_forward_name(layers[number])}" for number in numbers]


def is_outline(language_model: PreTrainedModel) -> bool:
    """Whether the model is names, shapes and types alone."""
    return any(parameter.is_meta for parameter in language_model.parameters())


def sharing_weights(language_model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules, whose parameters and buffers are the same tensors."""
    shared = [*language_model.parameters(), *language_model.buffers()]
    return copy.deepcopy(language_model, {id(tensor): tensor for tensor in shared})


def check_fit(manifest: Manifest, language_model: PreTrainedModel) -> None:
    """Raise DataError, naming the field, where the manifest is of another model."""
    config, model = language_model.config.get_text_config(), manifest.model
    for name, held, wanted in (
        ("model.d_model", config.hidden_size, model.d_model),
        ("model.vocab_size", language_model.get_input_embeddings().num_embeddings, model.vocab_size),
    ):
        if held != wanted:
            raise DataError(f"{name}: is {wanted} in the manifest, the pretrained model has {held}")
    longest = getattr(config, "max_position_embeddings", model.context)
    if model.context > longest:
        raise DataError(f"model.context: is {model.context}, the pretrained model reads at most {longest} tokens")
    n_layers = len(decoder_layers(language_model))
    missing = [layer for layer in manifest.pretrained.attach if layer >= n_layers]
    if missing:
        raise DataError(
            f"pretrained.attach: names layer {missing[0]}, the pretrained model has {n_layers}, counted from 0"
        )


def _unfrozen(frozen: PreTrainedModel, beginnings: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters of the copy's own, which are trained, in place of those whose names begin so; by name."""
    found: dict[str, nn.Parameter] = {}
    for beginning in beginnings:
        names = [name for name, _ in frozen.named_parameters() if name.startswith(beginning)]
        if not names:
            raise DataError(f"pretrained.unfreeze: no parameter of the pretrained model begins with {beginning}")
        for name in names:
            owner, _, last = name.rpartition(".")
            found[name] = _own(frozen.get_parameter(name))
            setattr(frozen.get_submodule(owner), last, found[name])
    return found


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """A copy; of an outline's parameter zeros, which whoever asked for an outline fills."""
    if parameter.is_meta:
        return nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
    return nn.Parameter(parameter.detach().clone())

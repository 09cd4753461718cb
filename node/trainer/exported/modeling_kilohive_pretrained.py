"""A pretrained model and the experts that a Kilohive swarm has trained beside it, for transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It needs nothing but torch, transformers and the two files beside it, which have the gates and the experts. The
pretrained model is transformers' own; what experts give is added to what its feed-forward parts give.
"""

# Shapes: B sequences, S positions of what was read and is new, T new positions, N = B * T tokens, D width, V token
#         values, Q heads of the gate.

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import SubConfigSpec

from .kilohive_experts import NOTHING, KilohiveCodes, KilohiveExpertsConfig, KilohiveMoE, all_ids, recent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast


class KilohivePretrainedConfig(KilohiveExpertsConfig):  # type: ignore[no-untyped-call]  # see KilohiveExpertsConfig
    """The pretrained model's own configuration, and where experts stand in it.

    `expert_paths` are its feed-forward parts that have experts beside them. What the run has trained is of the type
    `trained_dtype`: the experts, their gates, and of the pretrained model the parameters `unfrozen`.
    """

    model_type = "kilohive_pretrained"
    sub_configs_defaults = {  # noqa: RUF012 - as transformers declares it
        "pretrained": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    pretrained: dict[str, Any] | PreTrainedConfig | None = None
    expert_paths: list[str] | None = None
    unfrozen: list[str] | None = None
    trained_dtype: str = "float32"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """What caches and generation go by: the layers are those of the pretrained model."""
        config: Any = self.pretrained
        found: PreTrainedConfig = config.get_text_config(decoder=decoder, encoder=encoder)
        return found


class KilohivePretrainedForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]  # the same
    """Ids in, logits of the next token out."""

    config_class = KilohivePretrainedConfig
    base_model_prefix = ""
    _no_split_modules = ["KilohiveMoE"]  # noqa: RUF012 - as transformers declares it
    # The pretrained model checks for itself what it is asked for.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: KilohivePretrainedConfig) -> None:
        super().__init__(config)
        trained, paths = getattr(torch, config.trained_dtype), config.expert_paths or []
        self.language_model: Any = AutoModelForCausalLM.from_config(config.pretrained)  # type: ignore[no-untyped-call]
        # A parameter that is made in a type of its own keeps it, whatever the model is loaded in.
        for name in config.unfrozen or []:
            owner, _, last = name.rpartition(".")
            value = nn.Parameter(self.language_model.get_parameter(name).detach().to(trained))
            setattr(self.language_model.get_submodule(owner), last, value)
        self.moe_layers = nn.ModuleList(KilohiveMoE(config) for _ in paths).to(trained)
        self.codes = KilohiveCodes(config) if config.gate_reads == "tokens" else None
        self._codes_read = _CodesOfForward()
        for path, moe in zip(paths, self.moe_layers, strict=True):
            beside = _Beside(moe, trained, None if self.codes is None else self._codes_read)
            self.language_model.get_submodule(path).register_forward_hook(beside)
        # Some models prepare what they read in a way of their own.
        self.prepare_inputs_for_generation = self.language_model.prepare_inputs_for_generation
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(  # noqa: PLR0913, PLR0917 - what transformers calls it with
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """What the pretrained model returns for what it is given, with the experts in it.

        Where gates choose by tokens, ValueError without `input_ids`, and for a cache or a mask that is not [B, S].
        """
        code_NQD = None
        if self.codes is not None:
            cache = self._new_cache(use_cache) if cache is None else cache
            code_NQD = self._codes_of(input_ids, attention_mask, cache)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        with self._codes_read.during(code_NQD):
            output: CausalLMOutputWithPast | tuple[Any, ...] = self.language_model(
                **{name: value for name, value in given.items() if value is not None}
            )
        return output

    def _new_cache(self, use_cache: bool | None) -> Cache | None:
        wanted = getattr(self._text_config, "use_cache", True) if use_cache is None else use_cache
        return DynamicCache(config=self._text_config) if wanted else None

    def _codes_of(self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Codes [N, Q, D] of the new tokens, which are of those before them too."""
        if input_ids is None or self.codes is None:
            raise ValueError("input_ids: are missing; the experts of this model are chosen by them")
        n_layers = len(DynamicCache(config=self._text_config).layers)
        ids_BS, real_BS = all_ids(input_ids, attention_mask, cache, n_layers)
        ids_BTJ, _ = recent(ids_BS, real_BS, input_ids.shape[1], self.codes.n_back)
        code_NQD: Tensor = self.codes(ids_BTJ.clamp(min=0), (ids_BTJ != NOTHING)[..., None])
        return code_NQD

    @property
    def _text_config(self) -> PreTrainedConfig:
        return self.config.get_text_config(decoder=True)

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embeddings of the pretrained model."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output embeddings of the pretrained model."""
        embeddings: nn.Module | None = self.language_model.get_output_embeddings()
        return embeddings


class _CodesOfForward(threading.local):
    """The codes that gates choose by in the forward of this thread: layers of another's model pass nothing on but x."""

    code_NQD: Tensor | None = None

    def __reduce__(self) -> tuple[type[_CodesOfForward], tuple[()]]:
        return type(self), ()

    @contextmanager
    def during(self, code_NQD: Tensor | None) -> Iterator[None]:
        """Let the layers read these codes while the context lasts."""
        self.code_NQD = code_NQD
        try:
            yield
        finally:
            self.code_NQD = None


class _Beside:
    """Adds what experts give to what a feed-forward part gives that reads the same."""

    def __init__(self, moe: nn.Module, dtype: torch.dtype, codes: _CodesOfForward | None) -> None:
        self._moe, self._dtype, self._codes = moe, dtype, codes

    def __call__(self, _ffn: nn.Module, read: tuple[Tensor, ...], y_BTD: Tensor) -> Tensor:
        code_NQD = None
        if self._codes is not None:
            code_NQD = self._codes.code_NQD
            if code_NQD is None:
                raise ValueError("the experts are chosen by tokens: call the whole model, which sees them")
        added_ND: Tensor = self._moe(read[0].flatten(0, -2).to(self._dtype), code_NQD)
        return y_BTD + added_ND.view_as(y_BTD).to(y_BTD)

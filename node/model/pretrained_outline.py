"""The outline of a pretrained model: its modules with names, shapes and types, and without memory for any number."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from node.model.pretrained_files import quiet_transformers
from protocol.limits import MAX_LAYERS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

OF_FILES: Final = frozenset({"auto_map", "quantization_config", "transformers_version"})
"""What a configuration says of the files that it came with, and not of the model."""


def library_config(table: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that `library_table` has made a table of; LOAD_ERRORS where the library knows no such."""
    config: PreTrainedConfig = AutoConfig.for_model(**table)
    n_layers = config.get_text_config().num_hidden_layers
    if not 0 < n_layers <= MAX_LAYERS:  # each is made, if only in outline
        raise ValueError(f"num_hidden_layers is {n_layers}, must be from 1 to {MAX_LAYERS}")
    return config


def library_table(config: PreTrainedConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What the library has to know of a model to make it anew: without where its files were, and how they were packed.

    Fields that `changes` names have the values that it gives, in the configurations of the model's parts too.
    """
    table: dict[str, Any] = _changed(json.loads(config.to_json_string(use_diff=False)), changes)
    return table


def _changed(value: Any, changes: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON can be anything
    if not isinstance(value, dict):
        return value
    kept = {name: of for name, of in value.items() if not name.startswith("_") and name not in OF_FILES}
    return {name: changes[name] if name in changes else _changed(of, changes) for name, of in kept.items()}


def outline(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The outline of the model that `config` describes. Raises LOAD_ERRORS where the library makes none of it."""
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config), dtype=dtype, trust_remote_code=False
        )
    return model


def filled(like: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model that `like` outlines, with these weights in it: those of `dtype` are taken over and not copied."""
    with quiet_transformers():
        model: PreTrainedModel = type(like).from_pretrained(
            None, config=like.config, state_dict=dict(tensors), dtype=dtype
        )
    return model


def frozen_tensors(language_model: PreTrainedModel, unfrozen: Collection[str]) -> dict[str, Tensor]:
    """What stays as it was of a model whose parameters `unfrozen` are trained: each weight once, by its name."""
    twice = () if is_untied(language_model, unfrozen) else language_model.all_tied_weights_keys
    return {name: t for name, t in language_model.state_dict().items() if name not in unfrozen and name not in twice}


def is_untied(language_model: PreTrainedModel, unfrozen: Collection[str]) -> bool:
    """Whether weights that the model has as one under two names are two now: a run trains them under one alone."""
    tied: dict[str, str] = language_model.all_tied_weights_keys
    return any(name in unfrozen for pair in tied.items() for name in pair)

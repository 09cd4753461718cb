"""The pretrained model of a run, as an export takes it along: weights, configuration, and what a token is to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from transformers import AutoTokenizer

from node.model.pretrained import feed_forward_paths
from node.model.pretrained_files import (
    DTYPES,
    GGUF_SUFFIX,
    loaded_sparingly,
    model_folder,
    naming_load_errors,
    quiet_transformers,
)
from node.model.pretrained_outline import is_untied, library_table, outline
from node.trainer.exported.config_file import DTYPE_NAMES, LibraryModel
from node.trainer.exported.layout import PRETRAINED, meta_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from node.trainer.exported.layout import ModelPart
    from protocol.manifest import Manifest

NO_SETTING: Final = frozenset({"_from_model_config", "transformers_version"})
DEFAULT_TEMPLATE: Final = "default"


@dataclass(frozen=True, kw_only=True)
class PretrainedTokens:
    """What a pretrained model's own files say of its tokens.

    `special` are those that play a part, by their part, and `extra_special` others that are no text. `chat_template`
    makes a text of a chat, None if there is none. `end` is the id of the token that ends a text, if there is one, and
    `max_tokens` are the most that the model reads at once.
    """

    special: Mapping[str, str] = field(default_factory=dict)
    extra_special: tuple[str, ...] = ()
    chat_template: str | None = None
    end: int | None = None
    max_tokens: int


class PretrainedParts:
    """A run's pretrained model from its files, which have to be on this machine. Any thread may read from it.

    Weights are as the run computes with them: unpacked, and of its type. Where they are of that type in their files, or
    of half its size, they stay there until they are read.
    """

    def __init__(self, manifest: Manifest) -> None:
        """DataError where files are missing, or make no model, or one that the manifest does not fit."""
        self._manifest, config = manifest, manifest.pretrained
        self._folder, self._model = model_folder(config), loaded_sparingly(config)
        with naming_load_errors(self._folder):
            self.outline = outline(self._model.config, DTYPES[config.dtype])
        self._weights = self._model.state_dict()
        # transformers keeps some parts of some models in float32, whatever the rest is in.
        for name, outlined in self.outline.state_dict(keep_vars=True).items():
            outlined.data = outlined.data.to(self._dtype(self._weights[name]))
        trunk, _ = meta_model(manifest, self.outline)
        changes: dict[str, Any] = {"dtype": DTYPE_NAMES[config.dtype]}
        if is_untied(self._model, trunk.unfrozen.keys()):
            changes["tie_word_embeddings"] = False
        self.library = LibraryModel(
            config=library_table(self._model.config, changes),
            expert_paths=tuple(feed_forward_paths(self._model, config.attach)),
            unfrozen=tuple(trunk.unfrozen),
        )
        self.tokens = self._read_tokens()

    def tensors(self, part: ModelPart) -> dict[str, torch.Tensor]:
        """A piece of the model, in memory."""
        found = {tensor.name: self._weights[tensor.name.removeprefix(PRETRAINED)] for tensor in part.tensors}
        return {name: tensor.to(self._dtype(tensor)) for name, tensor in found.items()}

    def generation(self) -> dict[str, Any]:
        """What the model's own files say of how text is drawn from it, and where a text ends."""
        told: dict[str, Any] = {"eos_token_id": self.tokens.end, **self._model.generation_config.to_diff_dict()}
        return {name: value for name, value in told.items() if name not in NO_SETTING and value is not None}

    def _dtype(self, weight: torch.Tensor) -> torch.dtype:
        is_widened = self._manifest.pretrained.dtype == "fp32" and weight.is_floating_point()
        return DTYPES["fp32"] if is_widened else weight.dtype

    def _read_tokens(self) -> PretrainedTokens:
        gguf = next((file.name for file in self._manifest.pretrained.files if file.name.endswith(GGUF_SUFFIX)), None)
        with quiet_transformers(), naming_load_errors(self._folder):
            read = AutoTokenizer.from_pretrained(
                self._folder, gguf_file=gguf, local_files_only=True, trust_remote_code=False
            )
        config = self._model.config.get_text_config()
        template, n_tokens = read.chat_template, self._manifest.model.vocab_size

        def is_known(token: str) -> bool:  # the library's classes add tokens that no model of theirs was made for
            return cast("int", read.convert_tokens_to_ids(token)) < n_tokens

        special = {name: str(token) for name, token in read.special_tokens_map.items() if is_known(str(token))}
        return PretrainedTokens(
            special=special,
            extra_special=tuple(filter(is_known, map(str, read.extra_special_tokens))),
            chat_template=template.get(DEFAULT_TEMPLATE) if isinstance(template, dict) else template,
            end=read.eos_token_id if "eos_token" in special else None,
            max_tokens=getattr(config, "max_position_embeddings", self._manifest.model.context),
        )

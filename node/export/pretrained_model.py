"""The pretrained model of a run, as an export takes it along: weights, configuration, and what a token is to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from node.model.pretrained import feed_forward_paths
from node.model.pretrained_files import DTYPES, loaded_sparingly, model_folder, naming_load_errors
from node.model.pretrained_outline import is_untied, library_table, outline
from node.model.pretrained_tokens import read_tokens
from node.trainer.exported.config_file import DTYPE_NAMES, LibraryModel
from node.trainer.exported.layout import PRETRAINED, meta_model

if TYPE_CHECKING:
    import torch

    from node.trainer.exported.layout import ModelPart
    from protocol.manifest import Manifest

NO_SETTING: Final = frozenset({"_from_model_config", "transformers_version"})


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
        self.tokens = read_tokens(manifest)

    @property
    def max_tokens(self) -> int:
        """The most tokens that the model reads at once."""
        config = self._model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", self._manifest.model.context))

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

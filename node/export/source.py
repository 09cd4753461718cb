"""Where an export takes the model from: live replicas, one part after the other, each as it is at one moment."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import torch

from node.averaging.pieces import PARAMS
from node.export.unfinished import Taken
from node.model.experts.kinds import expert_kind
from node.model.replica_state import TensorSchema
from node.trainer.exported.layout import expert_tensor, meta_model, trunk_tensors
from node.trainer.live_trunk import take_trunk
from node.trainer.train_step import build_model
from node.trainer.trunk_state import load_trunk_weights

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import PreTrainedModel

    from node.averaging.live_replicas import LiveReplicas
    from node.export.unfinished import Word
    from node.model.trunk import Trunk
    from protocol.manifest import BlockId, Manifest


class PartSource:
    """A run's replicas, as parts of an exported model. Belongs to the event loop.

    `outline` is that of the pretrained model that the run is built around, None if there is none.
    """

    def __init__(self, replicas: LiveReplicas, outline: PreTrainedModel | None = None) -> None:
        self._replicas, self._outline = replicas, outline
        self._manifest = replicas.manifest

    async def fetch_trunk(self) -> tuple[dict[str, torch.Tensor], Taken]:
        """The trunk's tensors, and where they came from. Raises UnavailableError."""
        model = await asyncio.to_thread(seeded_trunk, self._manifest, self._outline)
        trunk = await take_trunk(model, self._replicas)
        word = _word(is_corroborated=trunk.is_corroborated)
        return trunk_tensors(model), Taken(version=trunk.version, word=word, run_tokens=trunk.run_tokens)

    async def fetch_block(
        self, block_id: BlockId, tensors: Iterable[TensorSchema]
    ) -> tuple[dict[str, torch.Tensor], Taken]:
        """The `tensors` of a block, and where they came from. Raises UnavailableError."""
        names = {expert_tensor(self._manifest.model, block_id, name): name for name in self._parameters}
        wanted = [TensorSchema(f"{PARAMS}{names[t.name]}", t.shape, t.dtype) for t in tensors]
        fetched = await self._replicas.fetch(block_id, sorted(wanted))
        taken = Taken(version=fetched.state.version, word=_word(is_corroborated=fetched.is_corroborated))
        return {name: fetched.state.params[parameter] for name, parameter in names.items()}, taken

    @property
    def _parameters(self) -> Iterable[str]:
        return expert_kind(self._manifest.model.expert_kind).shapes(self._manifest.model)


class Checkpoint(NamedTuple):
    """A trainer's folder, for a run whose trainers have ended."""

    folder: Path

    def read(self, manifest: Manifest, outline: PreTrainedModel | None = None) -> tuple[dict[str, torch.Tensor], Taken]:
        """The trunk's tensors. Raises CheckpointError if there is no checkpoint of the run's."""
        model = seeded_trunk(manifest, outline)
        progress = load_trunk_weights(self.folder, model, manifest.run_id)
        return trunk_tensors(model), Taken(
            version=progress.version, word="a checkpoint", run_tokens=progress.run_tokens
        )


def seeded_trunk(manifest: Manifest, outline: PreTrainedModel | None = None) -> Trunk:
    """The trunk as every trainer of the run has it before any training, with what is drawn from the run's seed.

    Of a pretrained model it has what the run trains, all of it zero.
    """
    _, experts = meta_model(manifest, outline)
    return build_model(manifest, experts, torch.Generator().manual_seed(manifest.seed), outline)


def _word(*, is_corroborated: bool) -> Word:
    return "two replicas" if is_corroborated else "one replica"

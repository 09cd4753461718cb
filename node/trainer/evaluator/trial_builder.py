"""What an offer is tried with: the expert that serves now, and this trainer's trunk with both experts in it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from node.trainer.evaluator.fetch_expert import fetch_expert
from node.trainer.evaluator.held_out_trial import HeldOutTrial, config_of
from node.trainer.evaluator.paired_experts import PairedExperts, paired_experts_model
from protocol.verdict import steps_between

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from dht.view import Replica
    from node.averaging.joining import Downloader
    from node.model.expert_file import ExpertId, Weights
    from node.model.moe import Experts
    from node.trainer.train_step import Training
    from protocol.manifest import BlockId


class TrialBuilder:
    """Builds trials beside a training; `replicas` are those of a block that can be called."""

    def __init__(
        self,
        training: Training,
        experts: Experts,
        client: Downloader,
        replicas: Callable[[BlockId], Sequence[Replica]],
    ) -> None:
        self._training, self._experts, self._client, self._replicas = training, experts, client, replicas
        self._manifest = training.manifest

    async def present_expert(self, place: ExpertId) -> tuple[Weights, int]:
        """Its weights, and the version of its block. Raises UnavailableError, DeadlineError."""
        replicas = self._replicas(place.block(self._manifest.model))
        return await fetch_expert(self._client, replicas, place, self._manifest)

    async def build(self, place: ExpertId, present: Weights, offered: Weights, number: int) -> HeldOutTrial:
        """The trial of the `number`-th offer, from 1, under the trunk as it is now."""
        trunk = await asyncio.wrap_future(self._training.look(self._trunk))
        return await asyncio.to_thread(self._trial, place, (present, offered), trunk, number)

    def staleness(self, place: ExpertId, version: int) -> str:
        """Why hosts would not take an expert in that was held against `version`; empty if they would."""
        block_id = place.block(self._manifest.model)
        newest = max((replica.version for replica in self._replicas(block_id)), default=version)
        limit = steps_between(self._manifest.averaging.max_staleness, newest)
        if limit is None or newest - version <= limit:
            return ""
        return f"block {block_id} took {newest - version} steps meanwhile, the limit is {limit}"

    def _trunk(self) -> dict[str, torch.Tensor]:
        return {name: t.detach().clone() for name, t in self._training.model.state_dict().items()}

    def _trial(
        self, place: ExpertId, pair: tuple[Weights, Weights], trunk: dict[str, torch.Tensor], number: int
    ) -> HeldOutTrial:
        training, manifest = self._training, self._manifest
        model = paired_experts_model(manifest, trunk, PairedExperts(self._experts, place, *pair, manifest))
        return HeldOutTrial(model, training.dataset, config_of(manifest.model, number), training.config.batch)

"""Where an export takes the model from: live replicas, one part after the other, each as it is at one moment."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from common.errors import UnavailableError
from node.averaging.joining import JoinConfig, fetch_with_word
from node.averaging.pieces import PARAMS
from node.export.unfinished import Taken
from node.model.experts.kinds import expert_kind
from node.model.replica_state import TensorSchema
from node.trainer.exported.layout import expert_tensor, meta_model, trunk_tensors
from node.trainer.train_step import build_model
from node.trainer.trunk_replica import trunk_weights
from node.trainer.trunk_state import load_trunk_weights
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from dht.view import PeerInfo, Replica
    from node.averaging.joining import Downloader, Fetched
    from node.export.unfinished import Word
    from node.model.trunk import Trunk
    from protocol.manifest import BlockId, Manifest, ModelConfig

logger = logging.getLogger(__name__)

WAIT_FOR_CHANGE_S = 1.0
DOWNLOAD_S = 30.0
"""For one download, besides what its bytes take."""

MAX_NAMED = 5
"""So many places of missing experts are told one by one."""


class ReplicaDirectory(Protocol):
    """Who has which part of the model; `dht.directory.Directory` is one."""

    def replicas(self, block: BlockId) -> tuple[Replica, ...]:
        """Live replicas of a block or of the trunk."""

    def peers(self) -> tuple[PeerInfo, ...]:
        """Live peers of every role."""

    async def wait_for_change(self, timeout_s: float) -> bool:
        """Return when replicas have come or gone, at the latest after `timeout_s`."""


class PartSource:
    """A run's replicas. Belongs to the event loop. Every wait is for `wait_s` seconds at most.

    `outline` is that of the pretrained model that the run is built around, None if there is none.
    """

    def __init__(
        self,
        manifest: Manifest,
        directory: ReplicaDirectory,
        client: Downloader,
        wait_s: float,
        outline: PreTrainedModel | None = None,
    ) -> None:
        self._manifest, self._directory, self._client, self._wait_s = manifest, directory, client, wait_s
        self._outline = outline
        self._join_config = JoinConfig(
            max_distance=manifest.averaging.clip_radius, timeout_s=DOWNLOAD_S, weights_only=True
        )

    async def wait_for(self, block_ids: Sequence[BlockId]) -> None:
        """Return once each of them has a live replica; raises UnavailableError that says which have none."""
        loop = asyncio.get_running_loop()
        deadline, is_told = loop.time() + self._wait_s, False
        while gone := [block_id for block_id in block_ids if not self._directory.replicas(block_id)]:
            left_s = deadline - loop.time()
            if left_s <= 0:
                raise UnavailableError(f"{self._without_replica(gone)} {self._given_up(gone)}")
            if not is_told:
                logger.info("Waiting for replicas, %.0f s at most: %s", left_s, self._without_replica(gone))
            is_told = True
            await self._directory.wait_for_change(min(left_s, WAIT_FOR_CHANGE_S))

    async def fetch_trunk(self) -> tuple[dict[str, torch.Tensor], Taken]:
        """The trunk's tensors, and where they came from. Raises UnavailableError."""
        model = await asyncio.to_thread(seeded_trunk, self._manifest, self._outline)
        run_tokens = max((p.run_tokens for p in self._directory.peers() if p.role == "trainer"), default=0)
        fetched = await self._fetched(TRUNK, trunk_weights(model))
        await asyncio.to_thread(_fill, model, fetched.state.params)
        return trunk_tensors(model), _taken(fetched, run_tokens)

    async def fetch_block(
        self, block_id: BlockId, tensors: Iterable[TensorSchema]
    ) -> tuple[dict[str, torch.Tensor], Taken]:
        """The `tensors` of a block, and where they came from. Raises UnavailableError."""
        names = {expert_tensor(self._manifest.model, block_id, name): name for name in self._parameters}
        wanted = [TensorSchema(f"{PARAMS}{names[t.name]}", t.shape, t.dtype) for t in tensors]
        fetched = await self._fetched(block_id, sorted(wanted))
        return {name: fetched.state.params[parameter] for name, parameter in names.items()}, _taken(fetched)

    @property
    def _parameters(self) -> Iterable[str]:
        return expert_kind(self._manifest.model.expert_kind).shapes(self._manifest.model)

    async def _fetched(self, block_id: BlockId, wanted: Sequence[TensorSchema]) -> Fetched:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        while True:
            await self.wait_for([block_id])
            try:
                replicas = self._directory.replicas(block_id)
                return await fetch_with_word(self._client, replicas, wanted, self._join_config, random.Random())
            except UnavailableError:
                if loop.time() >= deadline:
                    raise
                # A host that crashed a moment ago is still listed; its record expires.
                await self._directory.wait_for_change(WAIT_FOR_CHANGE_S)

    def _without_replica(self, gone: Sequence[BlockId]) -> str:
        return f"{words_of(gone, self._manifest.model)} {'has' if len(gone) == 1 else 'have'} no live replica"

    def _given_up(self, gone: Sequence[BlockId]) -> str:
        trunk = (
            "; the trunk comes from a live trainer, or with --trunk from a trainer's folder" if TRUNK in gone else ""
        )
        return (
            f"after a wait of {self._wait_s:g} s: start hosts for this run, look at it with `status`, and try again"
            f"{trunk}"
        )


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


def words_of(block_ids: Sequence[BlockId], model: ModelConfig) -> str:
    """The trunk and the experts of blocks, neighbours together."""
    ranges: list[tuple[int, int, int]] = []
    for layer, block in sorted(block_id for block_id in block_ids if block_id != TRUNK):
        experts = model.block_experts(block)
        if ranges and ranges[-1][0] == layer and ranges[-1][2] == experts.start:
            ranges[-1] = (layer, ranges[-1][1], experts.stop)
        else:
            ranges.append((layer, experts.start, experts.stop))
    named = [f"experts {start} to {stop - 1} of layer {layer}" for layer, start, stop in ranges[:MAX_NAMED]]
    named += [f"{len(ranges) - MAX_NAMED} more places"] if len(ranges) > MAX_NAMED else []
    return ", ".join((["the trunk"] if TRUNK in block_ids else []) + named)


def _taken(fetched: Fetched, run_tokens: int = 0) -> Taken:
    word: Word = "two replicas" if fetched.is_corroborated else "one replica"
    return Taken(version=fetched.state.version, word=word, run_tokens=run_tokens)


@torch.no_grad()
def _fill(model: Trunk, params: Mapping[str, torch.Tensor]) -> None:
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, rows in params.items():
        places[name].copy_(rows[0])

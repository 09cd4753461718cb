"""Parts of the model from a run's live replicas, for whoever takes them and trains nothing: an export, a server.

Each part is as it is at one moment, and compared with a second replica where there is one.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Protocol

from common.errors import UnavailableError
from node.averaging.joining import JoinConfig, fetch_with_word
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dht.view import PeerInfo, Replica
    from node.averaging.joining import Downloader, Fetched
    from node.model.replica_state import TensorSchema
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


class LiveReplicas:
    """A run's replicas. Belongs to the event loop. Every wait is for `wait_s` seconds at most.

    `trunk_flag` is the flag with which a person names a trainer's folder where no trainer is live.
    """

    def __init__(
        self, manifest: Manifest, directory: ReplicaDirectory, client: Downloader, wait_s: float, trunk_flag: str
    ) -> None:
        self.manifest = manifest
        self._directory, self._client, self._wait_s, self._trunk_flag = directory, client, wait_s, trunk_flag
        self._join_config = JoinConfig(
            max_distance=manifest.averaging.clip_radius, timeout_s=DOWNLOAD_S, weights_only=True
        )

    @property
    def run_tokens(self) -> int:
        """How many tokens the run has trained on, as its live trainers say; 0 without one."""
        return max((peer.run_tokens for peer in self._directory.peers() if peer.role == "trainer"), default=0)

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

    async def fetch(self, block_id: BlockId, wanted: Sequence[TensorSchema]) -> Fetched:
        """The weights of a block or of the trunk, and on whose word they are. Raises UnavailableError."""
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
        if list(gone) == [TRUNK]:
            return "no live trainer has the trunk"
        return f"{words_of(gone, self.manifest.model)} {'has' if len(gone) == 1 else 'have'} no live replica"

    def _given_up(self, gone: Sequence[BlockId]) -> str:
        trunk = f"start a trainer of this run, or name with {self._trunk_flag} the folder of one that has ended"
        hosts = "start hosts for this run, look at it with `status`, and try again"
        remedies = [trunk] * (TRUNK in gone) + [hosts] * any(block_id != TRUNK for block_id in gone)
        return f"after a wait of {self._wait_s:g} s: {'; '.join(remedies)}"


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

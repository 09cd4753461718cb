"""Which state a joiner takes: that of a live replica which another one corroborates, a checkpoint, or the run's seed.

A joiner cannot tell a good replica from a forged one by itself, and honest replicas are never bit-equal. So what one of
them sends is compared with the weights of a second: two that agree within honest drift are believed.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from common.errors import KilohiveError, UnavailableError
from node.averaging.gossip import relative_distance

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence

    import torch

    from dht.view import Replica
    from node.model.replica_state import ReplicaState, TensorSchema
    from protocol.endpoints import Address
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)


class Origin(StrEnum):
    """Where a joiner's state comes from."""

    REPLICAS = "replicas"
    OWN_CHECKPOINT = "own_checkpoint"
    STORED = "stored"
    SEED = "seed"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where to take a block from; `candidates` can be downloaded from, newest first."""

    origin: Origin
    candidates: tuple[Replica, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """`max_distance` is how far honest replicas' weights may lie apart, relative to their L2 norm.

    `timeout_s` is for one download; `max_sources` bounds how many replicas are asked and held in memory.
    """

    max_distance: float
    timeout_s: float = 120.0
    max_sources: int = 4


class Downloader(Protocol):
    """Fetches a peer's replica."""

    async def download(
        self,
        source: Address,
        block_id: BlockId,
        wanted: Sequence[TensorSchema],
        timeout_s: float,
        *,
        params_only: bool = False,
    ) -> ReplicaState:
        """Raises KilohiveError."""


def choose_source(live: Sequence[Replica], stored: Sequence[Replica], own_version: int | None) -> Source:
    """Live replicas if there are any, else the newest checkpoint, one's own rather than another's, else the seed.

    `own_version` is that of the checkpoint here, None without one.
    """
    if live:
        return Source(origin=Origin.REPLICAS, candidates=_newest_first(live))
    announced = max((replica.version for replica in stored), default=-1)
    if own_version is not None and own_version >= announced:
        return Source(origin=Origin.OWN_CHECKPOINT)
    if stored:
        return Source(origin=Origin.STORED, candidates=_newest_first(stored))
    return Source(origin=Origin.SEED)


async def fetch_replica(
    client: Downloader,
    candidates: Sequence[Replica],
    wanted: Sequence[TensorSchema],
    config: JoinConfig,
    rng: random.Random,
) -> ReplicaState:
    """The state of the newest replica whose weights those of another corroborate; a lone replica is believed.

    Sources that fail or send bytes that do not fit are passed over, and count as not there.

    Raises:
        UnavailableError: none could be had, or no two of them agree.
    """
    sources = _newest_first(rng.sample(candidates, len(candidates)))[: config.max_sources]
    answered: list[_Answer] = []
    for source in sources:
        state = await _take(client, source, wanted, config, params_only=bool(answered))
        if state is None:
            continue
        for earlier in answered:
            if (whole := await _corroborated(client, earlier, state, wanted, config)) is not None:
                return whole
        answered.append(_Answer(source, state))
    if len(answered) == 1:
        logger.info("Block %s is taken from %s alone", answered[0].source.block, answered[0].source.peer_id)
        return answered[0].state
    raise UnavailableError(_nobody(sources, answered, config.max_distance))


@dataclass(frozen=True)
class _Answer:
    source: Replica
    state: ReplicaState


async def _corroborated(
    client: Downloader, earlier: _Answer, witness: ReplicaState, wanted: Sequence[TensorSchema], config: JoinConfig
) -> ReplicaState | None:
    """The whole state of `earlier` if the witness agrees with it."""
    if not await _agree(earlier.state, witness, config.max_distance):
        return None
    if earlier.state.first:
        return earlier.state
    whole = await _take(client, earlier.source, wanted, config, params_only=False)
    # Asked again, it may send something else.
    return whole if whole is not None and await _agree(whole, witness, config.max_distance) else None


async def _take(
    client: Downloader, source: Replica, wanted: Sequence[TensorSchema], config: JoinConfig, *, params_only: bool
) -> ReplicaState | None:
    try:
        return await client.download(source.address, source.block, wanted, config.timeout_s, params_only=params_only)
    except KilohiveError as error:
        logger.warning("Block %s cannot be taken from %s: %s", source.block, source.peer_id, error)
        return None


async def _agree(one: ReplicaState, other: ReplicaState, max_distance: float) -> bool:
    return await asyncio.to_thread(_distance, one.params, other.params) <= max_distance


def _distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    delta = {name: p - one[name] for name, p in other.items()}
    # By the smaller norm: large weights must not make everything else look near.
    return max(relative_distance(delta, one), relative_distance(delta, other))


def _newest_first(replicas: Sequence[Replica]) -> tuple[Replica, ...]:
    return tuple(sorted(replicas, key=lambda replica: -replica.version))


def _nobody(sources: Sequence[Replica], answered: Sequence[_Answer], max_distance: float) -> str:
    if not sources:
        return "no replica is there to download from"
    block = sources[0].block
    if not answered:
        return f"block {block}: none of {len(sources)} replicas could be downloaded"
    return f"block {block}: no two of {len(answered)} replicas' weights are within {max_distance:g} of each other"

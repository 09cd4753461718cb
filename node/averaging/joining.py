"""Which state a joiner takes: that of a live replica which another one corroborates, a checkpoint, or the run's seed.

A joiner cannot tell a good replica from a forged one by itself, and honest replicas are never bit-equal. So what one of
them sends is compared with the weights of a second: two that agree within honest drift are believed. A download that
breaks off is gone on with, from the same replica or another (`partial.py`); what several have sent is believed only
on the word of one that has sent none of it, or asked for again whole.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from common.errors import InvalidInputError, KilohiveError, UnavailableError
from node.averaging.gossip import relative_distance
from node.averaging.partial import PartialDownloads

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence

    import torch

    from dht.view import Replica
    from node.averaging.partial import PartialReplica
    from node.model.replica_state import ReplicaState, TensorSchema
    from protocol.endpoints import Address
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

RESUME_AFTER_S = 0.5
"""The pause before a replica whose download broke off is asked for the rest."""


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

    `timeout_s` is for one download, beside what its bytes take; `max_sources` bounds how many replicas are asked and
    held in memory. `weights_only` leaves out Adam's moments, for whoever does not train, and begins a download that
    broke off anew, so that all of it is of one moment.
    """

    max_distance: float
    timeout_s: float = 120.0
    max_sources: int = 4
    weights_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A replica's state, and whose it is; `is_corroborated` if the weights of a second one agree with it."""

    state: ReplicaState
    peer_id: str
    is_corroborated: bool


class Downloader(Protocol):
    """Fetches a peer's replica."""

    async def download(
        self, source: Address, block_id: BlockId, wanted: PartialReplica, timeout_s: float
    ) -> ReplicaState:
        """The whole, once the pieces have come that `wanted` lacks; what comes stays in it. Raises KilohiveError."""


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
    partials: PartialDownloads | None = None,
) -> ReplicaState:
    """The state of the newest replica whose weights those of another corroborate; a lone replica is believed.

    Sources that fail or send bytes that do not fit are passed over, and count as not there. `partials` keeps what had
    come until the last of them failed.

    Raises:
        UnavailableError: none could be had, or no two of them agree.
    """
    return (await fetch_with_word(client, candidates, wanted, config, rng, partials)).state


async def fetch_with_word(
    client: Downloader,
    candidates: Sequence[Replica],
    wanted: Sequence[TensorSchema],
    config: JoinConfig,
    rng: random.Random,
    partials: PartialDownloads | None = None,
) -> Fetched:
    """What `fetch_replica` gives, and whether two replicas stand for it or one alone. Raises what that does."""
    sources = _newest_first(rng.sample(candidates, len(candidates)))[: config.max_sources]
    return await _Fetch(client, wanted, config, partials or PartialDownloads()).from_any_of(sources)


@dataclass(frozen=True)
class _Answer:
    """What `source` completed, and all who have sent some of it."""

    source: Replica
    state: ReplicaState
    senders: frozenset[str]


class _Fetch:
    """One block, from several replicas of it."""

    def __init__(
        self, client: Downloader, wanted: Sequence[TensorSchema], config: JoinConfig, partials: PartialDownloads
    ) -> None:
        self._client, self._wanted, self._config, self._partials = client, wanted, config, partials

    async def from_any_of(self, sources: Sequence[Replica]) -> Fetched:
        answered: list[_Answer] = []
        first = self._first(sources[0]) if sources else None
        for source in sources:
            answer = await self._take(source, first if first and not answered else self._anew(source, params_only=True))
            if answer is None:
                continue
            for earlier in answered:
                if (whole := await self._corroborated(earlier, answer)) is not None:
                    return Fetched(state=whole, peer_id=earlier.source.peer_id, is_corroborated=True)
            answered.append(answer)
        if len(answered) == 1:
            state, peer_id = await self._from_one(answered[0]), answered[0].source.peer_id
            return Fetched(state=state, peer_id=peer_id, is_corroborated=False)
        if first and not answered:
            self._partials.keep(first)
        raise UnavailableError(_nobody(sources, answered, self._config.max_distance))

    async def _from_one(self, answer: _Answer) -> ReplicaState:
        """Nobody else is there; for what others had sent before it, the one that is there is the witness."""
        source = answer.source
        if len(answer.senders) > 1:
            witness = await self._take(source, self._anew(source, params_only=True))
            if witness is None or not await self._agree(answer.state, witness.state):
                whole = await self._take(source, self._whole(source))
                if whole is None:
                    raise UnavailableError(_nobody([source], [], self._config.max_distance))
                answer = whole
        logger.info("Block %s is taken from %s alone", source.block, source.peer_id)
        return answer.state

    async def _corroborated(self, earlier: _Answer, witness: _Answer) -> ReplicaState | None:
        """The whole state of `earlier` if the witness agrees with it."""
        if not await self._agree(earlier.state, witness.state):
            return None
        is_whole = self._config.weights_only or earlier.state.first
        if is_whole and not earlier.senders & witness.senders:
            return earlier.state
        whole = await self._take(earlier.source, self._whole(earlier.source))
        # Asked again, it may send something else.
        return whole.state if whole is not None and await self._agree(whole.state, witness.state) else None

    async def _take(self, source: Replica, partial: PartialReplica) -> _Answer | None:
        """The rest of a replica, asked for as long as something more of it comes each time."""
        while True:
            senders, before = partial.senders - {source.peer_id}, partial.taken
            try:
                state = await self._client.download(source.address, source.block, partial, self._config.timeout_s)
            except KilohiveError as error:
                logger.warning("Block %s cannot be taken from %s: %s", source.block, source.peer_id, error)
                if isinstance(error, InvalidInputError) or self._config.weights_only:
                    partial.clear()
                # What does not fit may be what another has sent.
                if not (senders if isinstance(error, InvalidInputError) else partial.taken > before):
                    return None
            else:
                return _Answer(source, state, frozenset(partial.senders))
            await asyncio.sleep(RESUME_AFTER_S)
            logger.info("Going on with block %s from %s: %s", source.block, source.peer_id, partial)

    def _first(self, source: Replica) -> PartialReplica:
        """What is kept of a download that broke off, if it may be gone on with."""
        return self._whole(source) if self._config.weights_only else self._partials.begin(source.block, self._wanted)

    def _whole(self, source: Replica) -> PartialReplica:
        return self._anew(source, params_only=self._config.weights_only)

    def _anew(self, source: Replica, *, params_only: bool = False) -> PartialReplica:
        return self._partials.anew(source.block, self._wanted, params_only=params_only)

    async def _agree(self, one: ReplicaState, other: ReplicaState) -> bool:
        return await asyncio.to_thread(_distance, one.params, other.params) <= self._config.max_distance


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

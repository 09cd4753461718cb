"""The trunk of a run as its live trainers have it, for whoever uses a model that goes on training."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.events import EventLog
from node.averaging.live_replicas import LiveReplicas
from node.averaging.node_averaging import Averaging
from node.trainer.trunk_replica import trunk_weights
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from node.membership.swarm import Swarm
    from node.model.trunk import Trunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TakenTrunk:
    """What the trunk was when it was taken: its version, and the tokens that the run had trained on by then.

    `is_corroborated` if a second trainer's weights agree with it.
    """

    version: int
    run_tokens: int
    is_corroborated: bool


@asynccontextmanager
async def live_replicas(swarm: Swarm, wait_s: float, trunk_flag: str) -> AsyncIterator[LiveReplicas]:
    """The replicas of a swarm that was joined, until the block ends; see `LiveReplicas`."""
    averaging = Averaging(swarm.manifest, swarm.security, swarm.directory, EventLog())
    try:
        yield LiveReplicas(swarm.manifest, swarm.directory, averaging.client, wait_s, trunk_flag)
    finally:
        await averaging.stop()


async def take_trunk(model: Trunk, replicas: LiveReplicas) -> TakenTrunk:
    """Fill `model`, which is as the run's seed makes it, with a live trainer's weights. Raises UnavailableError."""
    run_tokens = replicas.run_tokens
    fetched = await replicas.fetch(TRUNK, trunk_weights(model))
    await asyncio.to_thread(_fill, model, fetched.state.params)
    logger.info(
        "The trunk is that of trainer %s at %s tokens of the run, version %d; %s",
        fetched.peer_id,
        f"{run_tokens:,}",
        fetched.state.version,
        "a second trainer confirms it" if fetched.is_corroborated else "nobody else could confirm it",
    )
    return TakenTrunk(version=fetched.state.version, run_tokens=run_tokens, is_corroborated=fetched.is_corroborated)


@torch.no_grad()
def _fill(model: Trunk, params: Mapping[str, torch.Tensor]) -> None:
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, rows in params.items():
        places[name].copy_(rows[0])

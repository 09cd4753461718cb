"""A trained trunk from its checkpoint, over the swarm's experts as they are now: what `evaluate` and `sample` use."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.tasks import until_stopped
from node.membership.config import ReachConfig
from node.membership.swarm import Swarm
from node.model.devices import pick_device
from node.trainer.dispatch.dispatcher import DispatchConfig, Dispatcher, dispatch_over
from node.trainer.train_step import build_model
from node.trainer.trunk_state import TrainingProgress, load_trunk_weights
from protocol.identity import Identity

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator

    from node.model.trunk import Trunk
    from node.trainer.config import EvaluateConfig, SampleConfig
    from protocol.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trunk in evaluation mode over remote experts, and how far it was trained."""

    model: Trunk
    swarm: Swarm
    manifest: Manifest
    dispatcher: Dispatcher
    progress: TrainingProgress
    device: torch.device


@asynccontextmanager
async def trained_model(config: EvaluateConfig | SampleConfig, stop: asyncio.Event) -> AsyncIterator[TrainedModel]:
    """Join the swarm that `config` names, until the block ends; DrainingError if `stop` comes before that."""
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    swarm = Swarm(config, Identity.generate(), ReachConfig(listen=config.listen))
    try:
        await until_stopped(swarm.join(), stop)
        dispatcher = dispatch_over(swarm, DispatchConfig())
        manifest = swarm.manifest
        generator = torch.Generator().manual_seed(manifest.seed)
        model = build_model(manifest, dispatcher, generator).to(device).eval()
        progress = load_trunk_weights(config.out, model, manifest.run_id)
        yield TrainedModel(
            model=model, swarm=swarm, manifest=manifest, dispatcher=dispatcher, progress=progress, device=device
        )
    finally:
        await swarm.leave()

"""A trained model: what `evaluate`, `sample` and `inspect` use.

Its trunk is a live trainer's or a checkpoint's, and its experts are the swarm's as they are now; or all of it is from
an exported folder.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.errors import ConfigError
from common.tasks import until_stopped
from node.membership.config import ReachConfig
from node.membership.swarm import Swarm
from node.model.devices import pick_device
from node.trainer.dispatch.dispatcher import DispatchConfig, Dispatcher, dispatch_over
from node.trainer.exported.loading import open_export
from node.trainer.live_trunk import live_replicas, take_trunk
from node.trainer.run_files import fetch_tokenizer
from node.trainer.train_step import build_model
from node.trainer.trunk_state import load_trunk_weights
from protocol.identity import Identity
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from common.tokenizer import Tokenizer
    from node.averaging.live_replicas import LiveReplicas
    from node.membership.config import SwarmConfig
    from node.model.trunk import Trunk
    from node.trainer.config import EvaluateConfig, InspectConfig, SampleConfig
    from protocol.manifest import Manifest

    TrainedModelConfig = EvaluateConfig | InspectConfig | SampleConfig


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trunk in evaluation mode over remote experts; `age` says in words how far it was trained."""

    model: Trunk
    tokenizer: Tokenizer
    swarm: Swarm
    manifest: Manifest
    dispatcher: Dispatcher
    age: str
    device: torch.device


@asynccontextmanager
async def trained_model(config: TrainedModelConfig, stop: asyncio.Event) -> AsyncIterator[TrainedModel]:
    """Join the swarm that `config` names, until the block ends; DrainingError if `stop` comes before that.

    Raises CheckpointError where the folder that `config` names has no trunk of the run's, UnavailableError where it
    names none and no trainer has one.
    """
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    swarm = Swarm(config, Identity.generate(), ReachConfig(listen=config.listen))
    try:
        await until_stopped(swarm.join(), stop)
        async with live_replicas(swarm, config.join_timeout_s, "--out") as replicas:
            if config.out is None:  # told before files are fetched that only trainers have
                await until_stopped(replicas.wait_for([TRUNK]), stop)
            tokenizer = await fetch_tokenizer(swarm, config.tokenizer, config.join_timeout_s, stop)
            dispatcher = dispatch_over(swarm, DispatchConfig())
            generator = torch.Generator().manual_seed(swarm.manifest.seed)
            model = build_model(swarm.manifest, dispatcher, generator).to(device).eval()
            age = await until_stopped(_take_weights(config.out, model, replicas), stop)
        yield TrainedModel(
            model=model,
            tokenizer=tokenizer,
            swarm=swarm,
            manifest=swarm.manifest,
            dispatcher=dispatcher,
            age=age,
            device=device,
        )
    finally:
        await swarm.leave()


async def _take_weights(folder: Path | None, model: Trunk, replicas: LiveReplicas) -> str:
    """Fill the model from a trainer's folder, or from a live trainer; how far it was trained, in words."""
    if folder is not None:
        return f"step {load_trunk_weights(folder, model, replicas.manifest.run_id).step}"
    return _version_words((await take_trunk(model, replicas)).version)


def _version_words(version: int) -> str:
    """How far a trunk was trained of which no trainer's step is known."""
    return f"version {version} of its trunk"


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """A model in evaluation mode with its tokenizer; `age` says in words how far it was trained.

    `manifest` has the model's shape and the seed by which text is held out. Without a `dispatcher` all experts are in
    this process.
    """

    model: Trunk
    tokenizer: Tokenizer
    manifest: Manifest
    age: str
    device: torch.device
    dispatcher: Dispatcher | None = None


@asynccontextmanager
async def text_model(config: TrainedModelConfig, stop: asyncio.Event) -> AsyncIterator[TextModel]:
    """The model of the exported folder that `config` names, or else of its swarm, as `trained_model` finds that.

    Raises ConfigError where it names both or neither, CheckpointError for a folder that is not whole.
    """
    check_named(config, config.export)
    if config.export is not None:
        yield await until_stopped(asyncio.to_thread(_exported, config, config.export), stop)
        return
    async with trained_model(config, stop) as trained:
        yield TextModel(
            model=trained.model,
            tokenizer=trained.tokenizer,
            manifest=trained.manifest,
            age=trained.age,
            device=trained.device,
            dispatcher=trained.dispatcher,
        )


def check_named(config: SwarmConfig, export: Path | None) -> None:
    """Raise ConfigError where neither a swarm nor an exported folder is named."""
    if export is None and not (config.join or config.swarm or config.run_id):
        raise ConfigError(
            "name the swarm with --join INVITE or --join FILE, from its coordinator, "
            "or a model that has left its swarm with --export FOLDER"
        )


def _exported(config: TrainedModelConfig, folder: Path) -> TextModel:
    if config.join or config.run_id or config.tokenizer:
        raise ConfigError("--export: names a model that needs no swarm; leave --join, run_id and tokenizer out")
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    exported = open_export(folder, device)
    return TextModel(
        model=exported.model,
        tokenizer=exported.tokenizer,
        manifest=exported.config.manifest,
        age=_version_words(exported.config.trunk_version),
        device=device,
    )

"""`evaluate` and `sample`: a trained trunk from its checkpoint, with the swarm's experts as they are now."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from common.folders import data_cache
from common.settings import check_minimums
from common.tasks import until_stopped
from common.text import printable
from node.data import open_dataset
from node.membership.config import ReachConfig
from node.membership.swarm import Swarm
from node.model.devices import pick_device
from node.model.transformer import bits_per_byte
from node.trainer.dispatch.dispatcher import DispatchConfig, dispatch_over
from node.trainer.run_tokenizer import fetch_tokenizer
from node.trainer.sampling import sample_text
from node.trainer.train_step import build_model, mean_nats
from node.trainer.trunk_state import TrainingProgress, load_trunk_weights
from protocol.identity import Identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from node.model.transformer import Transformer
    from node.trainer.config import EvaluateConfig, SampleConfig
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trunk in evaluation mode over remote experts, and how far it was trained."""

    model: Transformer
    swarm: Swarm
    manifest: Manifest
    progress: TrainingProgress
    device: torch.device


async def run_evaluate(config: EvaluateConfig, stop: asyncio.Event) -> None:
    """Print held-out bits per byte."""
    check_minimums(config, {"n_bytes": 1, "batch": 1, "threads": 1, "join_timeout_s": 0.1})
    async with _trained_model(config, stop) as trained:
        tokenizer = await fetch_tokenizer(trained.swarm, config.tokenizer, config.join_timeout_s, stop)
        seed, context = trained.manifest.seed, trained.manifest.model.context
        dataset = await asyncio.to_thread(
            open_dataset, config.data, cache_dir=data_cache(), seed=seed, tokenizer=tokenizer
        )
        batches = dataset.held_out_batches(config.batch, context, config.n_bytes)
        loss = await until_stopped(asyncio.to_thread(mean_nats, trained.model, batches, trained.device), stop)
    bits = bits_per_byte(loss, dataset.held_out_bytes_per_token)
    print_result(f"{bits:.4f} held-out bits per byte ({loss:.4f} nats per token) at step {trained.progress.step}")


async def run_sample(config: SampleConfig, stop: asyncio.Event) -> None:
    """Print the prompt and what the model writes after it."""
    check_minimums(config, {"n_bytes": 0, "temperature": 0, "threads": 1, "join_timeout_s": 0.1})
    async with _trained_model(config, stop) as trained:
        prompt = config.prompt.encode("utf-8", "surrogateescape")  # bytes that are no text are a prompt too
        writing = asyncio.to_thread(sample_text, trained.model, prompt, config.n_bytes, config.temperature, config.seed)
        text = await until_stopped(writing, stop)
    print_result(printable(text))


def print_result(text: str) -> None:
    """The result alone goes to standard output; everything else went to standard error."""
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


@asynccontextmanager
async def _trained_model(config: EvaluateConfig | SampleConfig, stop: asyncio.Event) -> AsyncIterator[TrainedModel]:
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
        yield TrainedModel(model=model, swarm=swarm, manifest=manifest, progress=progress, device=device)
    finally:
        await swarm.leave()

"""`evaluate`: how well a trained model foretells text that it was not trained on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rich.console import Console

from common.folders import data_cache
from common.settings import check_minimums
from common.tasks import until_stopped
from node.data import open_dataset
from node.model.transformer import bits_per_byte
from node.trainer.train_step import mean_nats
from node.trainer.trained_model import text_model

if TYPE_CHECKING:
    from node.trainer.config import EvaluateConfig


async def run_evaluate(config: EvaluateConfig, stop: asyncio.Event) -> None:
    """Print held-out bits per byte."""
    check_minimums(config, {"n_bytes": 1, "batch": 1, "threads": 1, "join_timeout_s": 0.1})
    async with text_model(config, stop) as trained:
        seed, context = trained.manifest.seed, trained.manifest.model.context
        dataset = await asyncio.to_thread(
            open_dataset, config.data, cache_dir=data_cache(), seed=seed, tokenizer=trained.tokenizer
        )
        batches = dataset.held_out_batches(config.batch, context, config.n_bytes)
        loss = await until_stopped(asyncio.to_thread(mean_nats, trained.model, batches, trained.device), stop)
    bits = bits_per_byte(loss, dataset.held_out_bytes_per_token)
    print_result(f"{bits:.4f} held-out bits per byte ({loss:.4f} nats per token) at {trained.age}")


def print_result(text: str) -> None:
    """The result alone goes to standard output; everything else went to standard error."""
    Console(soft_wrap=True, highlight=False).print(text, markup=False)

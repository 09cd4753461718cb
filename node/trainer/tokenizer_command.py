"""`tokenizer`: trains a tokenizer on text, for a run to come."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rich.console import Console

from common.atomic_file import write_atomically
from common.folders import data_cache, prepare_folder
from common.tasks import until_stopped
from common.tokenizer import FileTokenizer
from node.data import open_dataset
from node.data.train_tokenizer import train_tokenizer

if TYPE_CHECKING:
    from node.data import TextDataset
    from node.trainer.config import TokenizerConfig

logger = logging.getLogger(__name__)

MEASURED_BYTES = 1 << 20


async def run_tokenizer(config: TokenizerConfig, stop: asyncio.Event) -> None:
    """Train it on the part of the text that a run of the same seed trains on, and write its file."""
    prepare_folder(config.out.parent)
    opening = asyncio.to_thread(open_dataset, config.data, cache_dir=data_cache(), seed=config.seed)
    dataset = await until_stopped(opening, stop)
    await until_stopped(asyncio.to_thread(_train, config, dataset, stop), stop)


def _train(config: TokenizerConfig, dataset: TextDataset, stop: asyncio.Event) -> None:
    console = Console(stderr=True)
    file = train_tokenizer(dataset, config.vocab_size, stopped=stop.is_set, show_progress=console.is_terminal)
    tokenizer = FileTokenizer(file, str(config.out))
    if tokenizer.vocab_size < config.vocab_size:
        logger.warning(
            "This text gives only %s tokens, not %s: give more text, or ask for fewer",
            f"{tokenizer.vocab_size:,}",
            f"{config.vocab_size:,}",
        )
    write_atomically(config.out, file)
    measured = dataset.held_out[:MEASURED_BYTES].tobytes()
    n_tokens = len(tokenizer.encode([measured])[0])
    Console(soft_wrap=True, highlight=False).print(
        f"{config.out}: {tokenizer.vocab_size:,} tokens, each {len(measured) / n_tokens:.2f} bytes of held-out text on "
        "average",
        markup=False,
    )

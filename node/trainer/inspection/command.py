"""`inspect`: what the experts of a trained model have learnt, on held-out text."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING, Final

import torch
from rich.console import Console

from common.atomic_file import write_atomically
from common.errors import ConfigError, DrainingError
from common.folders import data_cache, give_matplotlib_a_folder, prepare_folder
from common.progress import progress_shown
from common.settings import check_minimums
from common.tasks import until_stopped
from node.data import open_dataset
from node.data.progress import SHOWN_AFTER_S
from node.data.topics import window_topics
from node.trainer.inspection.ablation import n_passes
from node.trainer.inspection.findings import InspectionConfig, findings
from node.trainer.inspection.reading import Reader, batch_of
from node.trainer.inspection.show import Inspected, findings_json, render_findings
from node.trainer.trained_model import text_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from node.data import TextDataset
    from node.trainer.config import InspectConfig
    from node.trainer.inspection.findings import Findings
    from node.trainer.trained_model import TextModel
    from protocol.manifest import ModelConfig

MAX_TOP: Final = 1_000
MAX_ABLATED: Final = 256
MAX_CHOICES: Final = 1 << 25
"""Choices of experts that are kept and counted: tokens times experts of a token times layers."""

MINIMUMS = {"tokens": 1, "top": 1, "ablate": 0, "seed": 0, "threads": 1, "join_timeout_s": 0.1}
MAXIMUMS = {"top": MAX_TOP, "ablate": MAX_ABLATED}


async def run_inspect(config: InspectConfig, stop: asyncio.Event) -> None:
    """Print what each layer's busiest experts are chosen for and are worth; write all of it where files are named.

    Raises:
        ConfigError: a setting is out of its range, or a file cannot be written.
        CheckpointError: the exported folder is not whole.
        DataError: the text cannot be read, or is too short.
    """
    _check(config)
    try:
        async with text_model(config, stop) as trained:
            _check_size(config.tokens, trained.manifest.model)
            seed = trained.manifest.seed
            opening = asyncio.to_thread(
                open_dataset, config.data, cache_dir=data_cache(), seed=seed, tokenizer=trained.tokenizer
            )
            dataset = await until_stopped(opening, stop)
            found = await until_stopped(asyncio.to_thread(_found, trained, dataset, config, stop.is_set), stop)
    except DrainingError:
        if not stop.is_set():
            raise
        return
    inspected = _inspected(trained, dataset, config)
    Console(highlight=False).print(render_findings(inspected, found, config.top))
    if config.json is not None:
        write_atomically(config.json, findings_json(inspected, found).encode())
    if config.plot is not None:
        _draw(found, dataset.held_out_bytes_per_token, config.plot)


def _check(config: InspectConfig) -> None:
    check_minimums(config, MINIMUMS)
    for name, maximum in MAXIMUMS.items():
        if getattr(config, name) > maximum:
            raise ConfigError(f"--{name}: must be at most {maximum:,}, is {getattr(config, name):,}")
    for flag, path in (("--json", config.json), ("--plot", config.plot)):
        if path is None:
            continue
        prepare_folder(path.parent)
        if path.is_dir():
            raise ConfigError(f"{flag}: {path} is a folder; name a file in it")


def _found(trained: TextModel, dataset: TextDataset, config: InspectConfig, stopped: Callable[[], bool]) -> Findings:
    model = trained.manifest.model
    numbers_N = dataset.spread_held_out(model.context, config.tokens)
    ids_NT = dataset.held_out_windows(numbers_N, model.context)
    topics = window_topics(dataset, numbers_N * model.context, model.context, trained.manifest.seed)
    passes = 1 + n_passes(model.n_layers, model.experts_per_layer, config.ablate)
    n_batches = -(-len(ids_NT) // batch_of(model.context, trained.model.vocab_size))
    n_steps = passes * n_batches
    with progress_shown(n_steps, SHOWN_AFTER_S) as tell:
        reader = Reader(trained.model, ids_NT, _stepping(n_steps, tell, stopped))
        inspection = InspectionConfig(ablate=config.ablate, seed=config.seed)
        return findings(reader, trained.tokenizer, topics, _live(trained, model), inspection)


def _check_size(n_tokens: int, model: ModelConfig) -> None:
    per_token = model.experts_per_token * model.n_layers
    if n_tokens * per_token > MAX_CHOICES:
        raise ConfigError(
            f"--tokens: {n_tokens:,} tokens make {n_tokens * per_token:,} choices of experts in this model, more than "
            f"{MAX_CHOICES:,}; look at {MAX_CHOICES // per_token:,} tokens at most"
        )


def _stepping(n_steps: int, tell: Callable[[float, str], None], stopped: Callable[[], bool]) -> Callable[[], None]:
    """What is to be called after each of `n_steps` steps; it raises DrainingError once `stopped`."""
    numbers = count(1)

    def step() -> None:
        if stopped():
            raise DrainingError("stopped before it was done")
        done = next(numbers)
        tell(done, f"reading held-out text with and without experts: {done / n_steps:.0%}")

    return step


def _live(trained: TextModel, model: ModelConfig) -> list[torch.Tensor]:
    if trained.dispatcher is None:
        return [torch.ones(model.experts_per_layer, dtype=torch.bool) for _ in range(model.n_layers)]
    return [trained.dispatcher.live_experts(layer) for layer in range(model.n_layers)]


def _inspected(trained: TextModel, dataset: TextDataset, config: InspectConfig) -> Inspected:
    model = trained.manifest.model
    return Inspected(
        model=trained.manifest.run_id if config.export is None else str(config.export),
        age=trained.age,
        gate=model.gate,
        experts_per_layer=model.experts_per_layer,
        experts_per_token=model.experts_per_token,
        text=dataset.corpus.title,
        bytes_per_token=dataset.held_out_bytes_per_token,
    )


def _draw(found: Findings, bytes_per_token: float, path: Path) -> None:
    give_matplotlib_a_folder()
    # Matplotlib takes a third of a second to import, and few ask for a plot.
    from common.figures import save_svg  # noqa: PLC0415
    from node.trainer.inspection.plot import figure_of  # noqa: PLC0415

    save_svg(figure_of(found, bytes_per_token), path)

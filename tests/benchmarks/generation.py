"""python -m tests.benchmarks.generation --json runs/bench/generation.json

Tokens per second of greedy generation in one process: over what was read before, against the whole window again for
every token; one stream, and several in one batch. Medians of runs that take turns. `--tokens 16 --context 16` for a
look.
"""

# Shapes: B streams, T tokens of a window.

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import tyro

from common.allocator import keep_freed_memory
from node.model.generation import Generation, Prompt
from node.model.moe import LocalExperts
from node.model.next_token import GenerationConfig
from node.trainer.train_step import build_transformer
from protocol.manifest import Manifest, ModelConfig
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from node.model.transformer import Transformer
    from node.model.trunk import Trunk

METRIC = "tokens/s"
STREAMS = (1, 8)
OURS, THEIRS = "what was read is kept", "the whole window for every token"


@dataclass(frozen=True, kw_only=True)
class GenerationBenchmark(RunsConfig):
    """Tokens per second of writing."""

    tokens: int = 512
    """Write this many tokens in each stream, after a prompt of one."""
    context: int = 512
    """Let the model see this many tokens."""
    threads: int = 1
    """Use this many CPU threads."""


def main(config: GenerationBenchmark) -> None:
    """Measure, write, print."""
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    tell, model = Teller(), new_model(config.context)
    rows = []
    for streams in STREAMS:
        contenders = {
            name: partial(rate_of, write, model, prompts(streams), config.tokens)
            for name, write in ((OURS, with_cache), (THEIRS, without_cache))
        }
        rows.append(row_of(streams, config, alternate(contenders, config.runs, tell)))
    config.publish("generation", rows, notes(model, config.threads))


def new_model(context: int) -> Transformer:
    """The shape of new runs, with its first weights: what it says has no part in how fast it is."""
    shape = ModelConfig(context=context, gate="hash", gate_reads="tokens", gate_heads=4, gate_score="softmax", smear=2)
    manifest = Manifest(name="bench", model=shape)
    generator = torch.Generator().manual_seed(manifest.seed)
    return build_transformer(manifest, LocalExperts(manifest), generator).eval()


def prompts(streams: int) -> list[list[int]]:
    """A token of its own for each stream, so that they go apart."""
    return [[ord("A") + stream] for stream in range(streams)]


def rate_of(
    write: Callable[[Trunk, Sequence[Sequence[int]], int], object],
    model: Trunk,
    asked: Sequence[Sequence[int]],
    n_tokens: int,
) -> float:
    """Tokens per second of all streams together."""
    started_s = time.perf_counter()
    write(model, asked, n_tokens)
    return len(asked) * n_tokens / (time.perf_counter() - started_s)


def with_cache(model: Trunk, asked: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
    """Tokens of each stream, from `Generation`."""
    greedy = GenerationConfig(max_new_tokens=n_tokens, temperature=0.0)
    steps = Generation(model, [Prompt(ids=ids, config=greedy) for ids in asked])
    return [list(of_stream) for of_stream in zip(*([new.token for new in step] for step in steps), strict=True)]


@torch.no_grad()
def without_cache(model: Trunk, asked: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
    """Tokens of each stream, from windows that slide as those of `Generation` do and are read whole every time.

    All prompts are equally long.
    """
    window_BT = torch.tensor(asked)
    written: list[torch.Tensor] = []
    while len(written) < n_tokens:
        if window_BT.shape[1] > model.context:
            window_BT = window_BT[:, -((model.context + 1) // 2) :]
        written.append(model(window_BT)[:, -1].argmax(1))
        window_BT = torch.cat((window_BT, written[-1][:, None]), 1)
    of_streams: list[list[int]] = torch.stack(written, 1).tolist()
    return of_streams


def row_of(streams: int, config: GenerationBenchmark, figures: Mapping[str, Sequence[float]]) -> Row:
    """One number of streams."""
    case = f"{streams} x {config.tokens} tokens, context {config.context}"
    return compare(case, METRIC, figures[OURS], THEIRS, figures[THEIRS])


def notes(model: Transformer, threads: int) -> tuple[str, ...]:
    """What was measured."""
    layers, width, experts = len(model.layers), model.embedding_VD.shape[1], ModelConfig.experts_per_layer
    return (
        f"{layers} layers, D={width}, {experts} experts a layer in this process, {threads} CPU thread(s)",
        "greedy; all streams in one batch, each after a prompt of one token; tokens of all streams together",
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(GenerationBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

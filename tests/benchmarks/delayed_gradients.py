"""python -m tests.benchmarks.delayed_gradients --json runs/bench/delayed_gradients.json

What it costs to hide latency behind older gradients: one trainer in this process whose trunk takes each step's
gradients some steps late, as it would with that many more steps in flight, at the manifest's rate and at less for the
trunk. Experts are up to date throughout. Held-out bits per byte after the same tokens; one run of each.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path  # noqa: TC003 - tyro reads the annotation
from typing import TYPE_CHECKING

import torch
import tyro

from common.folders import data_cache
from node.data import open_dataset
from node.model.moe import LocalExperts
from node.model.transformer import bits_per_byte
from node.trainer.train_step import StepConfig, Training, build_model
from protocol.manifest import Manifest, OptimizerConfig
from tests.benchmarks.report import Row, Teller, compare, document, publish

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from common.errors import TooFewExpertsError
    from node.data import TextDataset

FULL_TOKENS = 819_200
HELD_OUT_BYTES = 65_536
TOLD_EVERY = 50
LOSS = "held-out bits per byte"
DELAYS, RATES = (0, 1, 3), (1.0, 0.3)
NOTES = (
    "the default manifest: 2 layers x 512 experts, D=128; Wikipedia's text; batch 8, 2 micro-batches per step; seed 0",
    "delay: steps between a trunk's gradients and their use; rate: of the trunk, times the manifest's",
)


@dataclass(frozen=True, kw_only=True)
class DelayBenchmark:
    """Held-out loss by the delay of the trunk's gradients."""

    json: Path
    """File for the rows."""
    tokens: int = FULL_TOKENS
    """Of each run; fewer than the default are for a look, not for the docs."""


class LateTraining(Training):
    """Takes gradients `delay` steps after they were made; the last ones are never taken."""

    delay = 0

    def _apply(self, per_micro_batch: Sequence[Sequence[torch.Tensor | None]]) -> tuple[float, float]:
        waiting: deque[Sequence[Sequence[torch.Tensor | None]]] = self.__dict__.setdefault("_waiting", deque())
        waiting.append(per_micro_batch)
        return super()._apply(waiting.popleft()) if len(waiting) > self.delay else (0.0, 0.0)


def main(config: DelayBenchmark) -> None:
    """Measure, write, print."""
    torch.set_num_threads(1)
    tell, losses = Teller(), dict[tuple[int, float], float]()
    dataset = open_dataset(None, cache_dir=data_cache(), seed=0)
    for rate in RATES:
        for delay in DELAYS:
            losses[delay, rate] = train(config.tokens, delay, rate, dataset, tell)
            tell(f"{case_of(delay, rate)}: {losses[delay, rate]:.3f} held-out bits per byte")
    notes = NOTES if config.tokens >= FULL_TOKENS else (*NOTES, f"only {config.tokens:,} tokens: not for the docs")
    publish(config.json, document("delayed_gradients", rows_of(losses), notes))


def train(tokens: int, delay: int, rate: float, dataset: TextDataset, tell: Teller) -> float:
    """Held-out bits per byte at the end."""
    optimizer = OptimizerConfig(total_tokens=tokens)
    manifest = Manifest(name="bench", optimizer=replace(optimizer, lr=rate * optimizer.lr))
    experts, generator = LocalExperts(manifest), torch.Generator().manual_seed(manifest.seed)
    model = build_model(manifest, experts, generator)
    training = LateTraining(manifest, model, experts, dataset, StepConfig(batch=8), give_up)
    training.delay = delay
    n_steps = tokens // training.tokens_per_step
    try:
        for step in range(1, n_steps + 1):
            loss = training.step().loss
            if step % TOLD_EVERY == 0:
                tell(f"{case_of(delay, rate)}: step {step} of {n_steps}, {loss:.3f} nats per byte")
        return bits_per_byte(training.evaluate(HELD_OUT_BYTES))
    finally:
        training.close()


def give_up(error: TooFewExpertsError) -> None:
    """All experts are here."""
    raise error


def case_of(delay: int, rate: float) -> str:
    """As it stands in the rows."""
    return f"delay of {delay} step{'' if delay == 1 else 's'}, trunk's rate x {rate:g}"


def rows_of(losses: Mapping[tuple[int, float], float]) -> list[Row]:
    """Each against no delay at its rate, and the lower rate without delay against the manifest's."""
    rows = [
        compare(case_of(delay, rate), LOSS, [losses[delay, rate]], case_of(0, rate), [losses[0, rate]])
        for rate in RATES
        for delay in DELAYS[1:]
    ]
    base = case_of(0, RATES[0]), [losses[0, RATES[0]]]
    return [*rows, *(compare(case_of(0, rate), LOSS, [losses[0, rate]], *base) for rate in RATES[1:])]


if __name__ == "__main__":
    try:
        main(tyro.cli(DelayBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

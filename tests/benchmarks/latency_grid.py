"""python -m tests.benchmarks.latency_grid --json runs/bench/latency_grid.json

The grid of the DMoE paper (arXiv 2002.04013) with our dispatch: 64, 256 and 4,096 experts a layer, calls that take 100
and 1,000 ms on average, a tenth of them failing or none; digits (MNIST) and text. What is left of the loss after the
same steps, against calls that take no time. Delays pass on a virtual clock, in one process: what it shows is what late
and lost calls do to learning, not to speed. The digits need `make setup-bench`.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - tyro reads the annotation
from typing import TYPE_CHECKING, NamedTuple

import torch
import tyro

from node.model.learning_rate import learning_rate_factor
from tests.benchmarks.far_experts import Distance, FarExperts
from tests.benchmarks.grid_tasks import TASKS, build_task
from tests.benchmarks.report import Row, Teller, compare, document, publish
from tests.support.virtual_clock import VirtualClock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.benchmarks.grid_tasks import Task

EXPERTS = (64, 256, 4096)
FULL_STEPS, FULL_SEEDS = 40, 3
MICRO_BATCHES = 16
COMPUTE_S = 0.05
"""Between the starts of micro-batches: so long does a trainer with one slow core compute for each."""
GRAD_CLIP = 1.0


class Cell(NamedTuple):
    """Of the grid."""

    task: str
    experts: int
    delay_ms: int
    fail: float

    @property
    def name(self) -> str:
        """As it stands in the rows."""
        lost = f", {self.fail:.0%} of calls fail" if self.fail else ""
        return f"{self.task}, {self.experts:,} experts, mean delay {self.delay_ms:,} ms{lost}"


FAULTS = ((0, 0.0), (100, 0.0), (1000, 0.0), (100, 0.1), (1000, 0.1))


@dataclass(frozen=True, kw_only=True)
class GridBenchmark:
    """Loss by number of experts, delay and failures."""

    json: Path
    """File for the rows."""
    tasks: str = ",".join(TASKS)
    """Which, parted by commas."""
    steps: int = FULL_STEPS
    """Of each run; fewer than the default are for a look, not for the docs."""
    seeds: int = FULL_SEEDS
    """Runs of each cell, of weights, data and faults of their own; the same holds for fewer of them."""


def main(config: GridBenchmark) -> None:
    """Measure, write, print."""
    torch.set_num_threads(1)
    tell, losses = Teller(), dict[Cell, list[float]]()
    for name in config.tasks.split(","):
        if name not in TASKS:
            raise SystemExit(f"--tasks: {name!r} is not known; known: {', '.join(TASKS)}")
        for experts in EXPERTS:
            for fault in FAULTS:
                cell = Cell(name, experts, *fault)
                losses[cell] = [train(cell, seed, config.steps) for seed in range(config.seeds)]
                tell(f"{cell.name}: {statistics.median(losses[cell]):.4f} {TASKS[name].metric}")
    publish(config.json, document("latency_grid", rows_of(losses), notes_of(config)))


def train(cell: Cell, seed: int, steps: int) -> float:
    """Held-out loss at the end; the micro-batches of a step are all in flight."""
    size, clock = TASKS[cell.task], VirtualClock()
    manifest = size.manifest(cell.experts, seed, steps * MICRO_BATCHES)
    distance = Distance(delay_mean_s=cell.delay_ms / 1000, fail=cell.fail, seed=seed)
    experts = FarExperts(manifest, distance, clock)
    task = build_task(size, manifest, experts)
    optimizer = torch.optim.AdamW(task.parameters, lr=size.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        experts.run_tokens = step * MICRO_BATCHES * size.tokens
        for group in optimizer.param_groups:
            group["lr"] = size.lr * learning_rate_factor(manifest.optimizer, experts.run_tokens)
        _step(task, clock, optimizer, step)
    experts.is_near = True
    return task.held_out()


def _step(task: Task, clock: VirtualClock, optimizer: torch.optim.Optimizer, step: int) -> None:
    def gradients(index: int) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(task.loss(index), task.parameters, allow_unused=True)

    first = step * MICRO_BATCHES
    per_micro_batch = clock.run(gradients, range(first, first + MICRO_BATCHES), COMPUTE_S)
    for parts, parameter in zip(zip(*per_micro_batch, strict=True), task.parameters, strict=True):
        known = [part for part in parts if part is not None]
        parameter.grad = torch.stack(known).sum(0) / len(parts) if known else None
    torch.nn.utils.clip_grad_norm_(task.parameters, GRAD_CLIP)
    optimizer.step()
    for layer in task.layers:
        layer.balance()


def rows_of(losses: Mapping[Cell, list[float]]) -> list[Row]:
    """Each cell against the one without delay and failures; medians."""
    rows = []
    for cell, figures in losses.items():
        near = cell._replace(delay_ms=0, fail=0.0)
        if cell != near:
            rows.append(compare(cell.name, TASKS[cell.task].metric, figures, "no delay", losses[near]))
    return rows


def notes_of(config: GridBenchmark) -> tuple[str, ...]:
    """What was run."""
    small = config.steps < FULL_STEPS or config.seeds < FULL_SEEDS
    return (
        f"{config.steps} steps of {MICRO_BATCHES} micro-batches, one begun every {COMPUTE_S:g} s; 2 hosts",
        f"{config.seeds} seeds; a block for each host and layer",
        *(f"{name}: {size.note}" for name, size in TASKS.items()),
        "exponential delays on a virtual clock; a lost call is repeated once, pairs whose calls are lost twice dropped",
        *(("not for the docs: too few steps or seeds",) if small else ()),
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(GridBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

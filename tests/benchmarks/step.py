"""python -m tests.benchmarks.step --json runs/bench/step.json

A whole training step on Wikipedia's text, trunk and optimizers included: over two hosts against the same model in one
process, for the default model; and with 65,536 experts a layer against 1,024, of D=64 and H=8 with product keys. Tokens
per second, medians of runs that take turns.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import tyro

from common.allocator import keep_freed_memory
from common.folders import data_cache
from experiments.live.faulty_client import Faults
from node.data import open_dataset
from node.model.moe import LocalExperts
from node.trainer.train_step import StepConfig, Training, build_model
from protocol.manifest import Manifest, ModelConfig
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare
from tests.benchmarks.swarm_training import HOSTS, client_of_hosts, training_over
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from common.errors import TooFewExpertsError
    from node.data import TextDataset

METRIC = "tokens/s"
STEPS = StepConfig(batch=16, micro_batches=2)
STEPS_OF_A_RUN = 6
BLOCKS = 32
FEW, MANY = 1024, 65_536
SWARM, LOCAL = f"{HOSTS} hosts", "one process"
NOTES = (
    f"steps of {STEPS.micro_batches} micro-batches of {STEPS.batch} x {ModelConfig.context} tokens",
    "hosts and trainer have 1 thread each",
    "one process: trunk and experts in the benchmark's, its micro-batches on 2 threads",
    f"a run: {STEPS_OF_A_RUN} steps; the gates have learnt from the runs before",
    "touched: experts of both layers that one step changes, in one process, after the runs",
)


@dataclass(frozen=True, kw_only=True)
class StepBenchmark(RunsConfig):
    """Tokens per second of training."""


def main(config: StepBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    torch.set_num_threads(1)
    keep_freed_memory()
    tell, dataset = Teller(), open_dataset(None, cache_dir=data_cache(), seed=0)
    with ExitStack() as stack:
        contenders: dict[str, Callable[[], float]] = {}
        touched: dict[str, Callable[[], int]] = {}
        for name, manifest in manifests().items():
            with tell.busy(f"{name}: starting"):
                client = stack.enter_context(client_of_hosts(manifest, Faults()))
                training = stack.enter_context(training_over(client, STEPS, dataset))
            contenders[name_of(SWARM, name)] = run_of(training)
            experts = LocalExperts(manifest)
            here = local_training(experts, dataset)
            stack.callback(here.close)
            contenders[name_of(LOCAL, name)] = run_of(here)
            touched[name] = partial(touched_by_a_step, experts, here)
        figures = alternate(contenders, config.runs, tell)
        met = {name: count() for name, count in touched.items()}
    config.publish("step", [*rows_of(figures), touched_row(met)], NOTES)


def manifests() -> dict[str, Manifest]:
    """By the model's name."""
    sizes = {f"{experts:,} small experts a layer": small_model(experts) for experts in (FEW, MANY)}
    models = {"the default model": ModelConfig(), **sizes}
    return {name: Manifest(name="bench", model=model) for name, model in models.items()}


def small_model(experts: int) -> ModelConfig:
    """Two layers."""
    return ModelConfig(
        d_model=64,
        expert_hidden=8,
        experts_per_layer=experts,
        experts_per_block=experts // BLOCKS,
        gate="product_key",
    )


def local_training(experts: LocalExperts, dataset: TextDataset) -> Training:
    """The same model in this process."""
    manifest = experts.manifest
    generator = torch.Generator().manual_seed(manifest.seed)
    return Training(manifest, build_model(manifest, experts, generator), experts, dataset, STEPS, give_up)


def give_up(error: TooFewExpertsError) -> None:
    """All experts are here."""
    raise error


def run_of(training: Training) -> Callable[[], float]:
    """Some steps; tokens per second."""

    def run() -> float:
        started_s = time.monotonic()
        for _ in range(STEPS_OF_A_RUN):
            training.step()
        return STEPS_OF_A_RUN * training.tokens_per_step / (time.monotonic() - started_s)

    return run


def touched_by_a_step(experts: LocalExperts, training: Training) -> int:
    """Experts of all layers that the next step changes."""

    def learnt() -> torch.Tensor:
        return torch.cat([block.learnt_E.clone() for layer in experts.blocks.values() for block in layer])

    before = learnt()
    training.step()
    return int((learnt() != before).sum())


def touched_row(met: Mapping[str, int]) -> Row:
    """Of many experts against few, after the runs."""
    few, many = list(manifests())[1:]
    return compare(many, "touched in a step", [met[many]], few, [met[few]])


def name_of(where: str, model: str) -> str:
    """One contender."""
    return f"{model}, {where}"


def rows_of(figures: Mapping[str, Sequence[float]]) -> list[Row]:
    """Every model over hosts against one process; many experts against few by the seconds of a step."""
    names = list(manifests())
    pairs = [(name_of(SWARM, name), name_of(LOCAL, name)) for name in names]
    rows = [compare(ours, METRIC, figures[ours], theirs, figures[theirs]) for ours, theirs in pairs]
    tokens = STEPS.batch * STEPS.micro_batches * ModelConfig.context
    for where in (SWARM, LOCAL):
        few, many = (name_of(where, name) for name in names[1:])
        seconds = {name: [tokens / rate for rate in figures[name]] for name in (few, many)}
        rows.append(compare(many, "seconds per step", seconds[many], few, seconds[few]))
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(StepBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

"""python -m experiments.gpu --minutes 8: the arms of `longer` in so many minutes, where a GPU is at hand.

Nothing has to be chosen there. The arms' speeds are measured first; then all learn as many tokens as fit into the time,
one after the other, and the figures of each are in the file as soon as it has ended. Without a GPU it runs too.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import torch
import tyro
from rich.console import Console

from common.allocator import keep_all_memory
from common.atomic_file import write_atomically
from common.errors import KilohiveError
from common.settings import check_minimums
from experiments.arms.arm import TrainSpec
from experiments.arms.longer import ARMS
from experiments.arms.text import TextName, open_text
from experiments.arms.training import TrainRun, result_of
from experiments.harness.provenance import commit, machine
from experiments.harness.view import new_bars
from node.model.devices import pick_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.progress import Progress, TaskID

    from experiments.arms.arm import Arm
    from node.data import TextDataset

WARM_STEPS, TIMED_STEPS = 3, 5
MINIMUMS = {"minutes": 0.1, "tokens": 1, "batch": 1, "lr": 0}
SPARED: Final = 0.85
"""The part of the time that is planned for training: the rest is for evaluations, and for steps that are slower."""


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Train the arms that decide whether thousands of experts pay, in a given time."""

    minutes: float = 8.0
    """Take about this long in all."""
    tokens: int = 100_000_000
    """Train each arm on this many tokens at most."""
    batch: int = 128
    """Put this many sequences of 128 bytes into a step; a GPU wants more of them than the 16 of the experiments."""
    lr: float = 8e-3
    """Train trunk and experts at this peak rate."""
    seed: int = 0
    """Draw weights and order of the text with this seed."""
    device: str = "auto"
    """Compute on this device: auto, cpu, cuda, cuda:N or mps."""
    text: TextName = "long"
    """Learn this text: long has about 46 MB, and is read again where that is too little."""
    out: Path = Path("runs/gpu.json")
    """Write the figures to this file."""


class ArmContext:
    """What a run asks for of a trial's context: a folder, a device, and somebody who sees how far it is."""

    def __init__(self, folder: Path, device: str, bars: Progress, bar: TaskID) -> None:
        self.folder = self.shared = folder
        self.device = device
        self._bars, self._bar = bars, bar

    def progress(self, done: float, total: float, words: str) -> None:
        """Move the arm's bar."""
        self._bars.update(self._bar, completed=done, total=total, words=words)


def spec_of(config: GpuConfig, arm: Arm, tokens: int) -> TrainSpec:
    """One arm's training."""
    rate, batch = config.lr, config.batch
    return TrainSpec(arm=arm, seed=config.seed, tokens=tokens, lr=rate, expert_lr=rate, batch=batch, text=config.text)


@contextmanager
def new_run(config: GpuConfig, spec: TrainSpec, dataset: TextDataset, bars: Progress) -> Iterator[TrainRun]:
    """A run with a bar, which keeps no checkpoints: writing them would take the time that there is."""
    bar = bars.add_task(spec.arm.label, total=spec.steps, words="starting")
    with TemporaryDirectory() as folder:
        run = TrainRun(spec, ArmContext(Path(folder), config.device, bars, bar), dataset)
        run.keeps_checkpoints = False
        yield run
    bars.remove_task(bar)


def seconds_per_token(config: GpuConfig, arm: Arm, dataset: TextDataset, bars: Progress) -> float:
    """Seconds of a training step over its tokens, after the first steps."""
    with new_run(config, spec_of(config, arm, config.tokens), dataset, bars) as run:
        for _ in range(WARM_STEPS):
            run.training.step()
        started = time.perf_counter()
        for _ in range(TIMED_STEPS):
            run.training.step()
        seconds = time.perf_counter() - started
        run.training.close()
    return seconds / (TIMED_STEPS * run.spec.tokens_per_step)


def tokens_for(config: GpuConfig, seconds_per_token: Sequence[float], seconds_left: float) -> int:
    """How many tokens each arm can learn in the time that is left; a step at least."""
    fitting = int(SPARED * seconds_left / sum(seconds_per_token))
    step = config.batch * TrainSpec.context
    return max(step, min(config.tokens, fitting) // step * step)


def trained(config: GpuConfig, arm: Arm, tokens: int, dataset: TextDataset, bars: Progress) -> dict[str, Any]:
    """The figures of an arm, and its spec."""
    with new_run(config, spec_of(config, arm, tokens), dataset, bars) as run:
        run.go()
        return {"spec": run.spec.to_json(), "result": result_of(run, dataset)}


def run_arms(config: GpuConfig, arms: Sequence[Arm], console: Console) -> None:
    """Measure, plan, train; the file holds what has ended. Raises ConfigError."""
    check_minimums(config, MINIMUMS)
    started, dataset, device = time.monotonic(), open_text(config.text), pick_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    document: dict[str, Any] = {"commit": commit(), "machine": machine(), "device": name, "trials": {}}
    with new_bars(console) as bars:
        speeds = []
        for arm in arms:
            speeds.append(seconds_per_token(config, arm, dataset, bars))
            console.print(f"{arm.label}: {1 / speeds[-1]:,.0f} tokens a second on {name}", highlight=False)
        tokens = tokens_for(config, speeds, 60 * config.minutes - (time.monotonic() - started))
        console.print(f"{tokens:,} tokens for each of {len(arms)} arms", highlight=False)
        for arm in arms:
            trial = trained(config, arm, tokens, dataset, bars)
            document["trials"][TrainSpec.from_json(trial["spec"]).slug] = trial
            config.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(config.out, json.dumps(document).encode())
            nats = trial["result"]["nats_per_byte"]
            console.print(f"{arm.label}: {nats:.4f} held-out nats per byte, in {config.out}", highlight=False)


def main() -> int:
    """The command."""
    keep_all_memory()
    console = Console()
    try:
        run_arms(tyro.cli(GpuConfig, description=__doc__), ARMS, console)
    except KilohiveError as error:
        console.print(f"error: {error}", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped: the file has the arms that had ended", highlight=False)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

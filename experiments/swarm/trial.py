"""One arm of the swarm experiment: trained over experts wherever they are, then measured while all of them answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from experiments.arms.counted import CountedExperts
from experiments.arms.training import AnyModel, figures_of, trunk_with_experts
from experiments.live.placement import experts_at, manifest_of
from node.trainer.train_step import StepConfig, Training

if TYPE_CHECKING:
    from experiments.arms.arm import TrainSpec
    from experiments.harness.experiment import Result, TrialContext
    from experiments.live.placement import Placement, Where
    from node.data import TextDataset

CPU = torch.device("cpu")
PROGRESS_EVERY_STEPS = 4
POINTS = 16
"""The points of the training loss's curve."""


class SwarmTrial:
    """A trial while its experts are there; a trial that was cut begins again."""

    def __init__(self, spec: TrainSpec, place: Placement, where: Where, dataset: TextDataset) -> None:
        self._spec, self._where, self._dataset = spec, where, dataset
        self.experts = CountedExperts(where.experts)
        manifest = manifest_of(spec, place)
        trunk = trunk_with_experts(spec, manifest, self.experts, CPU)
        self.model = AnyModel(manifest=manifest, trunk=trunk, device=CPU)
        steps = StepConfig(
            batch=spec.batch // place.micro_batches,
            micro_batches=place.micro_batches,
            in_flight=place.in_flight,
            seed=spec.seed,
        )
        self.training = Training(manifest, trunk, self.experts, dataset, steps, where.wait)

    def train(self, context: TrialContext) -> Result:
        """Train to the last token; time and processor time are of the steps alone."""
        spec, losses, seconds = self._spec, list[float](), 0.0
        cpu_s, others_s = time.process_time(), self._where.cpu_seconds()
        try:
            for step in range(spec.steps):
                self._where.before_step(step)
                result = self.training.step()
                losses.append(result.loss)
                seconds += result.seconds
                if (step + 1) % PROGRESS_EVERY_STEPS == 0:
                    context.progress(step + 1, spec.steps, f"training loss {result.loss:.3f} nats per byte")
        finally:
            self.training.close()
        return {
            "tokens": self.training.run_tokens,
            "train": curve(losses, spec.tokens_per_step),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time() - cpu_s, 1),
            "others_cpu_seconds": round(self._where.cpu_seconds() - others_s, 1),
            "pairs": dict(self.experts.trained),
            **self._where.figures(),
        }

    def measure(self) -> Result:
        """Measure on held-out text; raises UnavailableError if an expert was missing, which falsifies the loss."""
        self._where.settle()
        found = figures_of(self.model, self._spec, self._dataset)
        self.experts.check_held_out()
        return found


def run_trial(spec: TrainSpec, place: Placement, context: TrialContext, dataset: TextDataset) -> Result:
    """Train, end all disturbance, measure."""
    with experts_at(place, manifest_of(spec, place), spec.steps, context.folder) as where:
        trial = SwarmTrial(spec, place, where, dataset)
        return {**trial.train(context), **trial.measure()}


def curve(losses: list[float], tokens_per_step: int) -> list[tuple[int, float]]:
    """Tokens, and the mean training loss since the point before."""
    size = max(1, len(losses) // POINTS)
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    ends = [min(start + size, len(losses)) for start in range(0, len(losses), size)]
    return [(end * tokens_per_step, sum(part) / len(part)) for end, part in zip(ends, parts, strict=True)]

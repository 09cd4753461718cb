"""Models that start together and then train apart, without a word between them: branches, and where their weights lie.

A course is one run in three parts. Up to `branch_tokens` one model learns from everything. For `apart_tokens` more
(those of all participants together) each participant trains a copy of it on a text of its own: the trunk whole, and,
where there are experts, one block of each layer, beside which no other expert is live. What is left of `tokens` is for
whatever is done with them then. Steps, schedule and tokens are counted as if it were one run: in each of its steps a
participant has its share of the batch.

Weights and moments stay in the folder that an experiment's trials share: whoever asks first trains them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from common.errors import ConfigError
from experiments.apart.ensemble import merge
from experiments.apart.shards import texts_of
from experiments.arms.arm import TrainSpec
from experiments.arms.training import Model, TrainRun, build_model
from node.model.devices import pick_device
from node.model.moe import LocalExperts

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.apart.shards import Sharding
    from experiments.harness.experiment import TrialContext
    from node.data import TextDataset
    from node.model.experts.block import Block, BlockGradients
    from node.trainer.train_step import StepResult
    from protocol.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class BranchSchedule(TrainSpec):
    """A run with a common start and a part in which participants train apart. Tokens are whole steps."""

    participants: int = 8
    branch_tokens: int
    apart_tokens: int

    def __post_init__(self) -> None:
        parts = {"batch": self.batch, "arm.experts": self.arm.experts}
        for name, value in parts.items():
            if value % self.participants:
                raise ConfigError(f"{name}: is {value}, must be shared evenly by {self.participants} participants")
        for name in ("tokens", "branch_tokens", "apart_tokens"):
            if getattr(self, name) % self.tokens_per_step:
                raise ConfigError(f"{name}: must be a multiple of the {self.tokens_per_step} tokens of a step")

    def manifest(self) -> Manifest:
        """One for all parts, so that each can read what another has saved; a block for each participant."""
        whole = super().manifest()
        if not self.arm.experts:
            return whole
        model = replace(whole.model, experts_per_block=self.arm.experts // self.participants)
        return replace(whole, model=model)

    @property
    def branch_step(self) -> int:
        """Where the common start ends."""
        return self.branch_tokens // self.tokens_per_step

    @property
    def apart_step(self) -> int:
        """Where the part without a word ends."""
        return (self.branch_tokens + self.apart_tokens) // self.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps `first` to `last` of a course, by one `participant` or (None) by everybody; perhaps of the gates alone."""

    first: int
    last: int
    participant: int | None = None
    gates_only: bool = False


class PartOfExperts(LocalExperts):
    """Experts of which only one block of each layer is live, or (None) all; `still` ones do not learn."""

    def __init__(self, manifest: Manifest, device: torch.device, block: int | None, *, still: bool = False) -> None:
        super().__init__(manifest, device)
        self._still = still
        self._live_E = torch.ones(manifest.model.experts_per_layer, dtype=torch.bool)
        if block is not None:
            for blocks in self.blocks.values():
                blocks[:] = [blocks[block]]
            own = manifest.model.block_experts(block)
            self._live_E[:] = False
            self._live_E[own.start : own.stop] = True

    def live_experts(self, layer: int) -> torch.Tensor:  # noqa: ARG002 - alike in all layers
        """Return which experts are live here; see `Experts.live_experts`."""
        return self._live_E

    def learn(self, block: Block, gradients: BlockGradients, lr: float) -> None:
        """Step the block as `LocalExperts.learn` does, unless its experts are to stay as they are."""
        if not self._still:
            super().learn(block, gradients, lr)


def stage_model(course: BranchSchedule, stage: Stage, device: torch.device) -> Model:
    """Untrained, with what the stage does not train frozen."""
    experts = None
    if course.arm.experts:
        experts = PartOfExperts(course.manifest(), device, stage.participant, still=stage.gates_only)
    model = build_model(course, device, experts)
    if stage.gates_only:
        model.trunk.requires_grad_(requires_grad=False)
        for layer in model.layers:
            layer.gate.requires_grad_()
    return model


class StageRun(TrainRun):
    """One stage. It begins with what lies in the folder `start`; a run that was cut, with its own."""

    def __init__(
        self,
        course: BranchSchedule,
        stage: Stage,
        context: TrialContext,
        dataset: TextDataset,
        start: Path | None,
    ) -> None:
        spec = course
        if stage.participant is not None:
            # Measured at its end alone: evaluations on the way would cost more than its training.
            spec = replace(
                course,
                batch=course.batch // course.participants,
                participants=1,
                evaluations=0,
                eval_bytes=course.final_eval_bytes,
            )
        super().__init__(spec, context, dataset, stage_model(course, stage, pick_device(context.device)))
        self.course, self.stage, self._start = course, stage, start
        self.last_step = stage.last

    def _resume(self) -> bool:
        if super()._resume():
            return True
        if self._start and not self.load(self._start):
            raise ConfigError(f"{self._start}: holds no model to go on from; delete it, and run the experiment again")
        self.training.steps_done = self.stage.first
        self._count()
        return False

    def _step(self) -> StepResult:
        result = super()._step()
        self._count()
        return result

    def _count(self) -> None:
        """A participant's step is one of the whole run's, and so are its tokens in the schedule."""
        self.training.run_tokens = self.training.steps_done * self.course.tokens_per_step


class Within:
    """A trial's context with another folder."""

    def __init__(self, context: TrialContext, folder: Path) -> None:
        self.folder, self.shared, self.device, self.progress = folder, context.shared, context.device, context.progress


class Branches:
    """Trained starts and participants of one course. Folders hold what `TrainRun.save` writes; `load` reads them."""

    def __init__(self, course: BranchSchedule, context: TrialContext, dataset: TextDataset) -> None:
        self._course, self._context, self._dataset = course, context, dataset
        self._texts: dict[Sharding, list[TextDataset]] = {}
        key = hashlib.sha256(json.dumps(course.to_json(), sort_keys=True).encode()).hexdigest()[:16]
        self._folder = context.shared / f"{course.slug}-seed{course.seed}-{key}"

    def branch(self) -> Path:
        """The common start."""
        return self._trained("branch", Stage(first=0, last=self._course.branch_step), self._dataset, None)

    def participant(self, sharding: Sharding, index: int) -> Path:
        """A participant after its time alone."""
        course = self._course
        stage = Stage(first=course.branch_step, last=course.apart_step, participant=index)
        return self._trained(f"{sharding}-{index}", stage, self.text(sharding, index), self.branch())

    def to_the_end(self, sharding: Sharding, index: int) -> Path:
        """A participant that goes on alone for the rest of the course; it lies in the trial's own folder."""
        course, folder = self._course, self._context.folder / f"{sharding}-{index}"
        stage = Stage(first=course.apart_step, last=course.steps, participant=index)
        return self._trained_in(folder, stage, self.text(sharding, index), self.participant(sharding, index))

    def participants(self, sharding: Sharding) -> list[Path]:
        """All of them, after their time alone."""
        return [self.participant(sharding, index) for index in range(self._course.participants)]

    def merged(self, sharding: Sharding) -> Path:
        """All of them as one model, which has learnt nothing since."""
        return merge(self._course, self.participants(sharding), self._folder / f"{sharding}-merged")

    def text(self, sharding: Sharding, index: int) -> TextDataset:
        """What a participant reads; held-out text is everybody's."""
        if sharding not in self._texts:
            course = self._course
            self._texts[sharding] = texts_of(self._dataset, sharding, course.participants, course.seed)
        return self._texts[sharding][index]

    def load(self, folder: Path, participant: int | None = None) -> Model:
        """The model in a folder; a participant's has its own experts alone."""
        stage = Stage(first=0, last=0, participant=participant)
        run = StageRun(self._course, stage, Within(self._context, folder), self._dataset, None)
        if not run.load(folder):
            raise ConfigError(f"{folder}: holds no model; delete the experiment's folder of trials, and run it again")
        run.training.close()
        run.model.trunk.eval()
        return run.model

    def _trained(self, name: str, stage: Stage, text: TextDataset, start: Path | None) -> Path:
        return self._trained_in(self._folder / name, stage, text, start)

    def _trained_in(self, folder: Path, stage: Stage, text: TextDataset, start: Path | None) -> Path:
        done = folder / "done"
        if not done.exists():
            run = StageRun(self._course, stage, Within(self._context, folder), text, start)
            run.go()
            run.save()
            done.touch()
        return folder


def measured_last(folder: Path) -> float:
    """Held-out nats per byte of what lies in a folder, as it was measured at its end."""
    nats: float = json.loads((folder / "log.json").read_bytes())["held_out"][-1][1]
    return nats

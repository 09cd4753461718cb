"""Claim 5: merging models is throwing things at the wall. Merges of models trained apart, and choosing between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.apart.branches import Branches, BranchSchedule
from experiments.apart.shards import evenly, split
from experiments.arms.arm import Arm, TrainSpec, cost
from experiments.arms.labels import Topics
from experiments.arms.text import open_text
from experiments.arms.training import TrainRun, log_likelihood, nats_per_window
from experiments.harness.experiment import Trial
from experiments.merging.choosing import PREFIX
from experiments.merging.evaluator import MergeEvaluator, chosen_between, unsearched, ways_apart
from experiments.merging.experiment import MergingExperiment
from experiments.merging.report import POSTERIOR, MergingResults, Wording
from experiments.merging.search import POPULATION, SCALES, TIES_DENSITIES, TIES_SCALES, MergeSearch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from experiments.harness.experiment import Preset, Result, TrialContext
    from experiments.merging.merges import Weights
    from node.data import TextDataset
    from node.model.transformer import Transformer

ARM = Arm(label="dense", hidden=256)
PARTICIPANTS = 4
RATE = 8e-3
"""The best for this model on `granularity`'s text."""

STEP = 2048
WHEN = {"late": 3, "early": 1}
"""Quarters of the tokens that pass before they part."""

BRANCH = "the branch, before they part"
JOINT = "trained jointly"
WORDS = Wording(
    unit="byte",
    kinds={"late": "parting late", "early": "parting early"},
    base=BRANCH,
    base_words="the branch",
    together={JOINT: "joint training"},
    rivals={POSTERIOR: "the participants as an ensemble by the posterior, at {models} times the FLOPs, are"},
    model="A model",
    training_passes=3,
    length="way of a participant, part of the branch's length",
)

VALIDATION_EVERY = 4
"""One held-out document in this many is for choosing, and not for the figures."""


@dataclass(frozen=True, kw_only=True)
class BranchMergePlan:
    """`tokens` of a whole course, participants together; `evaluations` of each search, on so many bytes."""

    tokens: int
    seeds: int
    evaluations: int
    validation_bytes: int

    def course(self, seed: int, quarters: int) -> BranchSchedule:
        """One model's run that is divided among participants after so many quarters."""
        branch = self.tokens // 4 * quarters
        return BranchSchedule(
            **vars(self.joint(seed)),
            participants=PARTICIPANTS,
            branch_tokens=branch,
            apart_tokens=self.tokens - branch,
        )

    def trials(self, seed: int) -> list[Trial]:
        """The joint model, and what is trained apart late and early."""
        trials = [Trial(name=f"joint-seed{seed}", spec={"kind": "joint", "train": self.joint(seed).to_json()})]
        for kind, quarters in WHEN.items():
            course = self.course(seed, quarters).to_json()
            chosen_on = {"evaluations": self.evaluations, "validation_bytes": self.validation_bytes}
            trials.append(Trial(name=f"{kind}-seed{seed}", spec={"kind": kind, "train": course, **chosen_on}))
        return trials

    def joint(self, seed: int) -> TrainSpec:
        """The run in which all train together to its end."""
        return TrainSpec(
            arm=ARM,
            seed=seed,
            tokens=self.tokens,
            lr=RATE,
            expert_lr=RATE,
            evaluations=1,
            eval_bytes=16_384,
            final_eval_bytes=98_304,
        )


PRESETS: dict[Preset, BranchMergePlan] = {
    "quick": BranchMergePlan(tokens=80 * STEP, seeds=1, evaluations=2 * POPULATION, validation_bytes=8_192),
    "full": BranchMergePlan(tokens=256 * STEP, seeds=3, evaluations=8 * POPULATION, validation_bytes=16_384),
}
FULL = PRESETS["full"]

METHOD = f"""
The dense byte-level transformer of [granularity](granularity.md) (3 layers, D=128, {ARM.hidden} hidden units) learns
English Wikipedia summaries at the rate that was best for it there, {RATE:g}. A course has {FULL.tokens:,} tokens in
all, those of all participants counted, under one schedule of the rate. It begins as one model that is trained on
everything, the branch; then {PARTICIPANTS} participants each train a copy on a shard of their own, the corpus's 12
topics put together in {PARTICIPANTS} parts of nearly equal size, and no word passes between them. *Late*, they part
after three quarters of the tokens, *early*, after one quarter. In each step a participant has a quarter of the batch,
so it takes as many steps as *joint*, the control: one model that trains on everything to the end.

The merges, each one model of the size of a participant: the average (by size of the shards would be the same, as they
are nearly equal); the average weighted by exp(-loss / temperature); task arithmetic (arXiv 2212.04089), scales
{", ".join(f"{scale:g}" for scale in SCALES)}; TIES (arXiv 2306.01708), densities
{", ".join(f"{density:g}" for density in TIES_DENSITIES)} by scales {", ".join(f"{scale:g}" for scale in TIES_SCALES)};
and a share for each participant in each layer, embedding and head by an evolutionary search (after arXiv 2403.13187,
but differential evolution, as SciPy has it, and without TIES below it), {FULL.evaluations} evaluations. The null, which
is throwing things at the wall: the best of as many random shares of the same kind, small and large. Both begin with the
average.

Choosing between the same participants instead: their predictions averaged evenly; averaged by the posterior, the
likelihood that each has given to the window so far (arXiv 2208.03306); the one that was likeliest on the first {PREFIX}
bytes of the window; the one whose shard holds the window's topic, told by the label; and, as the bound of choosing one,
whichever was best on the window in hindsight.

Everything that is chosen (scales, densities, temperatures, shares, a participant) is chosen on every fourth document of
the held-out text ({FULL.validation_bytes:,} bytes of windows, spread evenly); every figure is of the other documents
({FULL.joint(0).final_eval_bytes:,} bytes). Both are the same for all {FULL.seeds} seeds; a difference is taken seed by
seed. Intervals are of 95 %.

What this cannot show: {FULL.tokens:,} tokens leave the models far from trained, and participants of nearly trained or
much larger models move less, which is where merging is said to work. The published evolutionary search takes thousands
of evaluations; with more of them the text to choose on would have to be larger too.
"""


def carry_out(spec: dict[str, Any], context: TrialContext) -> Result:
    """Train what it takes; then merge and choose."""
    dataset = open_text()
    return joint(spec, dataset, context) if spec["kind"] == "joint" else apart(spec, dataset, context)


def results_of(plan: BranchMergePlan, by_kind: Mapping[str, Sequence[Result]]) -> MergingResults:
    """Return the results as the page takes them."""
    return MergingResults(
        words=WORDS,
        together={JOINT: by_kind["joint"]},
        apart={kind: by_kind[kind] for kind in WHEN},
        cost=cost(plan.joint(0)),
    )


EXPERIMENT = MergingExperiment(
    name="merging",
    claim='"Merging is throwing things at the wall."',
    method=METHOD,
    presets=PRESETS,
    carry_out=carry_out,
    results_of=results_of,
)


@dataclass(frozen=True, kw_only=True)
class MergeTexts:
    """The held-out text in two: to choose on, and for the figures. `topic_X`: of the latter's bytes."""

    chosen_on: TextDataset
    figures: TextDataset
    topic_X: NDArray[np.uint8]

    def topics(self) -> TextDataset:
        """The text for the figures with each byte's topic in its place: the same windows are cut from it."""
        return replace(self.figures, held_out=self.topic_X)


def held_out_in_two(dataset: TextDataset) -> MergeTexts:
    """Split the held-out text in two, document by document."""
    sizes = [len(document) for document in split(dataset.held_out)]
    is_for_choosing_X = np.repeat(np.arange(len(sizes)) % VALIDATION_EVERY == 0, sizes)
    return MergeTexts(
        chosen_on=replace(dataset, held_out=dataset.held_out[is_for_choosing_X]),
        figures=replace(dataset, held_out=dataset.held_out[~is_for_choosing_X]),
        topic_X=Topics(dataset).held_out_X[~is_for_choosing_X],
    )


def joint(spec: dict[str, Any], dataset: TextDataset, context: TrialContext) -> Result:
    """One model, trained on everything to the end."""
    train = TrainSpec.from_json(spec["train"])
    run = TrainRun(train, context, dataset)
    run.go()
    nats_N = nats_per_window(run.model.trunk, held_out_in_two(dataset).figures, train, train.final_eval_bytes)
    return {"nats": float(nats_N.mean()), "tokens": run.training.run_tokens}


def apart(spec: dict[str, Any], dataset: TextDataset, context: TrialContext) -> Result:
    """A branch and its participants; every way to make one prediction of them."""
    course = BranchSchedule.from_json(spec["train"])
    branches = Branches(course, context, dataset)
    folders = [branches.branch(), *branches.participants("topic")]
    trunk = branches.load(folders[0]).trunk
    base, *participants = (dict(branches.load(folder).trunk.state_dict()) for folder in folders)
    measure = InTrunk(course, trunk, held_out_in_two(dataset), spec["validation_bytes"])
    merge_evaluator = MergeEvaluator(measure, spec["evaluations"], context.progress)
    ways = {BRANCH: unsearched(merge_evaluator.figure(base), 1)}
    ways |= merge_evaluator.merges(MergeSearch(base, participants, merge_evaluator.loss), course.seed)
    log_p_PNT = torch.stack([merge_evaluator.log_likelihood(participant) for participant in participants])
    owner_N = owners(dataset, measure.texts, course)
    return {
        "ways": ways | chosen_between(log_p_PNT, owner_N, "byte", "topic"),
        "participants": (-log_p_PNT.mean((1, 2))).tolist(),
        **distances(base, participants),
        "bytes_of_evaluation": measure.n_bytes,
    }


class InTrunk:
    """Measures whole models in one trunk; a Measure."""

    def __init__(self, course: BranchSchedule, trunk: Transformer, texts: MergeTexts, validation_bytes: int) -> None:
        self.texts, self._course, self._trunk = texts, course, trunk
        self._windows = list(texts.chosen_on.held_out_batches(course.batch, course.context, validation_bytes))
        self.n_bytes = sum(len(ids) for ids in self._windows) * course.context

    def chosen_on(self, weights: Weights) -> float:
        """Measure the weights; see `Measure`."""
        self._trunk.load_state_dict(weights)
        return -float(log_likelihood(self._trunk, self._windows).mean())

    def log_likelihood(self, weights: Weights) -> torch.Tensor:
        """Measure the weights; see `Measure`."""
        self._trunk.load_state_dict(weights)
        course = self._course
        windows = self.texts.figures.held_out_batches(course.batch, course.context, course.final_eval_bytes)
        return log_likelihood(self._trunk, windows)


def owners(dataset: TextDataset, texts: MergeTexts, course: BranchSchedule) -> torch.Tensor:
    """Return for each window of the figures [N] the participant whose shard holds the topic of its first byte."""
    shard_of_topic = evenly(np.bincount(Topics(dataset).train_X).tolist(), course.participants)
    windows = torch.cat(list(texts.topics().held_out_batches(course.batch, course.context, course.final_eval_bytes)))
    return torch.from_numpy(shard_of_topic)[windows[:, 0]]


def distances(base: Weights, participants: Sequence[Weights]) -> Result:
    """How far participants went, as a part of the branch's length, and the mean cosine between two of their ways."""
    start, length, cosine = ways_apart(base, participants)
    return {"length": length / start, "cosine": cosine}

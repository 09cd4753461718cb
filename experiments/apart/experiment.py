"""Claim 3: all experts must be trained together, the gate too. Against: branches trained apart, then put together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.atomic_file import write_atomically
from experiments.apart.branches import Branches, BranchSchedule, Stage, StageRun, Within, measured_last
from experiments.apart.ensemble import by_posterior, evenly_weighted, forget_gates, held_out
from experiments.apart.report import apart_report
from experiments.apart.shards import SHARDINGS, Sharding
from experiments.arms.arm import Arm
from experiments.arms.specialisation import specialisation
from experiments.arms.text import open_text
from experiments.arms.training import log_likelihood, nats_per_window, result_of
from experiments.arms.tuning import SEED
from experiments.harness.experiment import Trial, no_results

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from experiments.arms.training import Model
    from experiments.harness.experiment import Preset, Report, Result, TrialContext
    from node.data import TextDataset

ARM = Arm(label="8 of 256 experts", hidden=32, experts=256, per_token=8)
STEP = 2048
UNTUNED_RATE = 4e-3
ENSEMBLES: tuple[Sharding, ...] = ("topic",)
"""Whose participants are also trained on, to be asked together; eight models to measure for each."""
# On either side of what is best for both that are tuned.
RATES = (4e-3, 8e-3, 1.6e-2)


@dataclass(frozen=True, kw_only=True)
class ApartPlan:
    """How much is trained: steps in all, of which a quarter together at the start, half apart, a quarter at the end."""

    steps: int
    seeds: int
    shardings: tuple[Sharding, ...] = SHARDINGS
    tuning_steps: int = 0
    final_eval_bytes: int = 32_768

    def course(self, seed: int, rate: float, steps: int) -> BranchSchedule:
        """One model's run."""
        return BranchSchedule(
            arm=ARM,
            seed=seed,
            tokens=steps * STEP,
            lr=rate,
            expert_lr=rate,
            branch_tokens=steps // 4 * STEP,
            apart_tokens=steps // 2 * STEP,
            eval_bytes=8_192,
            final_eval_bytes=self.final_eval_bytes,
        )


PRESETS: dict[Preset, ApartPlan] = {
    "quick": ApartPlan(steps=32, seeds=1, shardings=("topic", "random"), final_eval_bytes=16_384),
    "full": ApartPlan(steps=512, seeds=3, tuning_steps=64),
}
FULL = PRESETS["full"]
TUNED = ("joint", "mixed")
"""What rates are tuned for: all together from start to end, and apart by topic with everything trained at the end."""

METHOD = f"""
The byte-level transformer of granularity (3 layers, D=128, 4 heads, 128 bytes of context; {ARM.label} of 32 hidden
units work for a token) learns English Wikipedia summaries. Every arm has {FULL.steps * STEP:,} tokens in all, those of
all participants counted, and one schedule of the rate over them: warm-up over 3 %, then a cosine to a tenth. A quarter
of them is a start in common: one model, trained on everything. *Joint* goes on like that to the end. In all other arms
it is then divided among 8 participants: each has the whole trunk, an eighth of the experts of each layer with the
gate's rows for these, and a text of its own; it calls nobody else's experts, and no word passes between them. In this
half of the tokens each takes as many steps as *joint* does, with an eighth of the batch. Then trunks (and their Adam
moments) are averaged, and experts and the gates' rows put side by side, which makes a model as large as *joint*. The
last quarter is spent on *the gate alone*, everything else frozen (Branch-Train-Merge, arXiv 2208.03306, but with a
gate), or on *mixing*, which trains everything (Branch-Train-MiX, arXiv 2403.07816), on the same text as *joint* reads
then. In the *ensemble* (arXiv 2208.03306, 2303.14177) the participants go on alone instead; their 8 predictions are
then averaged, weighted by the likelihood that each has given to the window so far. It needs 8 models for each byte.

The texts: by topic, the 12 labels of the corpus put together in 8 parts of like size; by clusters, spherical k-means of
the articles' words (tf-idf); and the control that should fail, at random. Nulls: the merged model as it is, with the
gates' rows side by side; the same with a gate that has learnt nothing; and the start in common with the last quarter
but without the half that is spent apart, on fewer tokens: what training apart adds has to show against it. Rates are
tuned alike for *joint* and for *mixing* by topic, on {FULL.tuning_steps * STEP:,} tokens with a seed of its own:
{", ".join(f"{rate:g}" for rate in RATES)} are tried; the other arms apart take that of *mixing*, as they share its
start. Held-out text is the same for all arms and the {FULL.seeds} seeds; a difference is taken seed by seed and window
by window. Intervals are of 95 %.

What this cannot show: {FULL.steps * STEP:,} tokens are few, a quarter of what granularity trains on, and a
participant has a sixteenth of them for itself. With longer training apart the trunks go further from each other, and
texts have more time to make participants different. The published methods start from models that are nearly trained.
"""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a trial works with."""

    course: BranchSchedule
    sharding: Sharding
    branches: Branches
    context: TrialContext
    dataset: TextDataset


class Apart:
    """The experiment."""

    name = "apart"
    claim = '"All must be trained together, the gate too."'
    method = METHOD

    def plan(self, preset: Preset, results: Mapping[str, Result]) -> Sequence[Trial]:
        """Rates first; then, seed by seed, the start in common, and what goes on from it."""
        return planned(PRESETS[preset], results)

    def run(self, spec: dict[str, Any], context: TrialContext) -> Result:
        """One arm, or those that share participants, from the start that lies in the shared folder."""
        dataset, course = open_text(), BranchSchedule.from_json(spec["course"])
        branches = Branches(course, context, dataset)
        bench = Bench(course=course, sharding=spec["sharding"], branches=branches, context=context, dataset=dataset)
        return KINDS[spec["kind"]](bench)

    def report(self, preset: Preset, results: Mapping[str, Result]) -> Report:
        """Differences from joint, and where they come from."""
        trials = [trial for trial in self.plan(preset, results) if trial.name in results]
        whole = [trial for trial in trials if not trial.name.startswith("tune-")]
        if not {"joint", "nothing", "apart"} <= {trial.spec["kind"] for trial in whole}:
            raise no_results(self.name, preset, "joint, and of what was trained apart")
        return apart_report(trials, results)


def planned(plan: ApartPlan, results: Mapping[str, Result]) -> list[Trial]:
    """Trials that can be run, or have been: those whose weights they read are there."""
    courses = [plan.course(SEED, rate, plan.tuning_steps) for rate in RATES if plan.tuning_steps]
    tuning = [Trial(name=f"tune-lr{course.lr:g}", spec=_spec("tune", course, "topic")) for course in courses]
    rates = best_rates(tuning, results)
    trials = [trial for seed in range(plan.seeds) for trial in _of_seed(plan, seed, rates)] if rates else []
    # A run that is cut has every seed of what matters most.
    trials.sort(key=lambda of: SHARDINGS.index(of[0].spec["sharding"]))
    return [*tuning, *(trial for trial, needs in trials if all(name in results for name in needs))]


def best_rates(tuning: Sequence[Trial], results: Mapping[str, Result]) -> dict[str, float]:
    """Return the best rate of each tuned arm once all tuning is done; nothing before."""
    if not all(trial.name in results for trial in tuning):
        return {}
    if not tuning:
        return dict.fromkeys(TUNED, UNTUNED_RATE)
    found = [(trial.spec["course"]["lr"], results[trial.name]) for trial in tuning]
    return {kind: min(found, key=lambda of: of[1][kind])[0] for kind in TUNED}


def _of_seed(plan: ApartPlan, seed: int, rates: Mapping[str, float]) -> list[tuple[Trial, list[str]]]:
    """Each trial of a seed, with those whose weights it reads: the first leaves the start in common."""
    together, course = (plan.course(seed, rates[kind], plan.steps) for kind in TUNED)
    first = _trial("nothing", course)
    joint = _trial("joint", together)
    shared = [first.name] if together == course else []
    apart = [_trial("apart", course, sharding) for sharding in plan.shardings]
    return [(first, []), (joint, shared), *((trial, [first.name]) for trial in apart)]


def _trial(kind: str, course: BranchSchedule, sharding: Sharding | None = None) -> Trial:
    name = f"{kind}{f'-{sharding}' if sharding else ''}-seed{course.seed}"
    return Trial(name=name, spec=_spec(kind, course, sharding or "topic"))


def _spec(kind: str, course: BranchSchedule, sharding: Sharding) -> dict[str, Any]:
    return {"kind": kind, "sharding": sharding, "course": course.to_json()}


def tune(bench: Bench) -> Result:
    """Nats per byte at the end of what is tuned, at one rate."""
    return {"joint": joint(bench)["nats_per_byte"], "mixed": mixed(bench)["nats_per_byte"]}


def joint(bench: Bench) -> Result:
    """The start, and all together to the end."""
    course = bench.course
    return _stage(bench, "joint", Stage(first=course.branch_step, last=course.steps), bench.branches.branch())


def nothing(bench: Bench) -> Result:
    """The start and the last quarter: as joint, but for the tokens that others spend apart."""
    course, begin = bench.course, bench.branches.branch()
    found = _stage(bench, "nothing", Stage(first=course.apart_step, last=course.steps), begin)
    return found | {"start": _measured(bench, bench.branches.load(begin))}


def apart(bench: Bench) -> Result:
    """The participants by one kind of text, and all that is made of them."""
    branches, course, sharding = bench.branches, bench.course, bench.sharding
    found = {
        "participants": [measured_last(folder) for folder in branches.participants(sharding)],
        "bytes": [len(branches.text(sharding, index).train) for index in range(course.participants)],
        **merged(bench),
        "gate": gate(bench),
        "mixed": mixed(bench),
    }
    return found | ({"ensemble": ensemble(bench)} if sharding in ENSEMBLES else {})


def merged(bench: Bench) -> Result:
    """The merged model before it has learnt anything, with two gates."""
    model = bench.branches.load(bench.branches.merged(bench.sharding))
    found = {"merged": _measured(bench, model)}
    course = bench.course
    found["merged"]["specialisation"] = specialisation(model, bench.dataset, course.batch, course.seed)
    forget_gates(model, course.seed)
    return {**found, "forgotten": _measured(bench, model)}


def gate(bench: Bench) -> Result:
    """The merged model, of which the gates alone learn."""
    course = bench.course
    stage = Stage(first=course.apart_step, last=course.steps, gates_only=True)
    return _stage(bench, "gate", stage, bench.branches.merged(bench.sharding))


def mixed(bench: Bench) -> Result:
    """The merged model, trained whole."""
    course, begin = bench.course, bench.branches.merged(bench.sharding)
    return _stage(bench, "mixed", Stage(first=course.apart_step, last=course.steps), begin)


def ensemble(bench: Bench) -> Result:
    """Participants that go on alone, each a whole model; their predictions put together."""
    found = []
    for index in range(bench.course.participants):
        folder = bench.branches.to_the_end(bench.sharding, index)
        trunk = bench.branches.load(folder, index).trunk
        found.append(log_likelihood(trunk, held_out(bench.course, bench.dataset)))
    log_p_PNT = torch.stack(found)
    return {
        "participants": (-log_p_PNT.mean((1, 2))).tolist(),
        "even": _windows(evenly_weighted(log_p_PNT)),
        **_windows(by_posterior(log_p_PNT)),
    }


def _stage(bench: Bench, name: str, stage: Stage, begin: Path) -> Result:
    """The figures of a last stage, which are kept: a trial that was cut does not train it again."""
    folder = bench.context.folder / name
    done = folder / "result.json"
    if not done.exists():
        run = StageRun(bench.course, stage, Within(bench.context, folder), bench.dataset, begin)
        run.go()
        write_atomically(done, json.dumps(result_of(run, bench.dataset)).encode())
    result: Result = json.loads(done.read_bytes())
    return result


def _measured(bench: Bench, model: Model) -> Result:
    course = bench.course
    return _windows(nats_per_window(model.trunk, bench.dataset, course, course.final_eval_bytes))


def _windows(nats_N: torch.Tensor) -> Result:
    return {"nats_per_byte": float(nats_N.mean()), "window_nats": [round(nats, 4) for nats in nats_N.tolist()]}


KINDS: dict[str, Callable[[Bench], Result]] = {"tune": tune, "nothing": nothing, "joint": joint, "apart": apart}

EXPERIMENT = Apart()

"""The page of `apart`: how far each way of training apart is from training together, and what closes the distance."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from experiments.apart.branches import BranchSchedule
from experiments.arms.arm import TrainSpec, cost
from experiments.arms.arms import ArmResults
from experiments.arms.report import SIZE, load_table, loss_table, specialisation_table
from experiments.harness.experiment import Report, Trial, markdown_table
from experiments.harness.statistics import estimate
from node.model.gate.stats import WINDOW_STEPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from experiments.apart.shards import Sharding
    from experiments.arms.arm import Cost
    from experiments.harness.experiment import Result
    from experiments.harness.statistics import Estimate

JOINT, NOTHING = "joint", "start and last quarter only"
TEXTS: dict[Sharding, str] = {"topic": "by topic", "cluster": "by clusters", "random": "at random"}
WORTH = 0.01
"""Nats per byte: whoever is that near has as good a model."""


def merged_label(sharding: Sharding) -> str:
    """Label the merged model as it is."""
    return f"apart {TEXTS[sharding]}, merged"


def gate_label(sharding: Sharding) -> str:
    """Label the model whose gate alone has learnt."""
    return f"apart {TEXTS[sharding]}, gate learnt"


def mixed_label(sharding: Sharding) -> str:
    """Label the model that was mixed."""
    return f"apart {TEXTS[sharding]}, mixed"


def ensemble_label(sharding: Sharding) -> str:
    """Label the ensemble."""
    return f"ensemble {TEXTS[sharding]}"


def forgotten_label(sharding: Sharding) -> str:
    """Label the merged model with a gate that knows nothing."""
    return f"apart {TEXTS[sharding]}, gate forgotten"


LABELS: dict[str, Callable[[Sharding], str]] = {
    "mixed": mixed_label,
    "gate": gate_label,
    "ensemble": ensemble_label,
    "merged": merged_label,
    "forgotten": forgotten_label,
}
"""Labels by the name that an arm's figures have in the result of a trial."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm's result with one seed."""

    label: str
    course: BranchSchedule
    result: Result

    @property
    def trial(self) -> Trial:
        """Return the row as the trial that the tables of arms read."""
        course = self.course
        spec = TrainSpec(
            arm=replace(course.arm, label=self.label),
            seed=course.seed,
            tokens=course.tokens,
            lr=course.lr,
            expert_lr=course.expert_lr,
        )
        return Trial(name=f"{spec.slug}-seed{spec.seed}", spec=spec.to_json())


def rows_of(trial: Trial, result: Result) -> Iterator[Row]:
    """Arms by the trial that has their figures."""
    course, kind, sharding = BranchSchedule.from_json(trial.spec["course"]), trial.spec["kind"], trial.spec["sharding"]
    if kind == "joint":
        yield Row(label=JOINT, course=course, result=result)
    elif kind == "nothing":
        yield Row(label=NOTHING, course=course, result=result)
    elif kind == "apart":
        for name, label in LABELS.items():
            if name in result:
                yield Row(label=label(sharding), course=course, result=result[name])


class ApartFindings:
    """Results by arm, and by kind of trial."""

    def __init__(self, trials: Sequence[Trial], results: Mapping[str, Result]) -> None:
        long = [trial for trial in trials if not trial.name.startswith("tune-")]
        self._rates_tried = {trial.spec["course"]["lr"] for trial in trials if trial.name.startswith("tune-")}
        self._rows = [row for trial in long for row in rows_of(trial, results[trial.name])]
        self._by_kind: dict[tuple[str, str], list[Result]] = {}
        for trial in long:
            key = (trial.spec["kind"], trial.spec["sharding"])
            self._by_kind.setdefault(key, []).append(results[trial.name])
        present = {row.label for row in self._rows}
        self.shardings = [text for text in TEXTS if mixed_label(text) in present]
        order = [JOINT, *(label(text) for label in LABELS.values() for text in TEXTS), NOTHING]
        self.labels = [label for label in order if label in present]
        self.all = self.arms(self.labels)
        self.course = self._rows[0].course

    def arms(self, labels: Sequence[str]) -> ArmResults:
        """Return the results of those arms, in that order."""
        rows = [row for label in labels for row in self._rows if row.label == label]
        found = ArmResults([row.trial for row in rows], {row.trial.name: row.result for row in rows})
        found.rates_tried |= self._rates_tried
        return found

    def of(self, kind: str, sharding: str = "topic") -> list[Result]:
        """Results of one kind, by seed."""
        return self._by_kind.get((kind, sharding), [])


def apart_report(trials: Sequence[Trial], results: Mapping[str, Result]) -> Report:
    """Report on the trials that have a result."""
    found = ApartFindings(trials, results)
    learnt = [label for label in found.labels if found.all.results(label)[0].get("gates")]
    with_gates = [label for label in found.labels if "specialisation" in found.all.results(label)[0]]
    tables = {
        "Loss": loss_table(found.all, against=JOINT),
        "Where the difference comes from": gap_table(found),
        "Participants and ensembles": participants_table(found),
        "What it costs": cost_table(found),
        "Load": f"{load_table(found.arms(learnt))}\n\n{load_note(found.course)}",
        "Specialisation": specialisation_table(found.arms(with_gates)),
    }
    caption = "Held-out nats per byte above joint training, with 95 % intervals over seeds; to the left is better"
    return Report(finding=finding(found), tables=tables, figures={"difference": (caption, differences(found))})


def gap_table(found: ApartFindings) -> str:
    """Make the table from the merged model to joint training, step by step."""
    rows = []
    for text in found.shardings:
        gap, *parts = distances(found, text)
        shares = [f"{part.mean / gap.mean:.0%}" if gap.mean > gap.half_width else "-" for part in parts[:2]]
        forgotten = str(found.all.difference(forgotten_label(text), merged_label(text)))
        rows.append([TEXTS[text], str(gap), str(parts[0]), str(parts[1]), str(parts[2]), *shares, forgotten])
    header = [
        "texts", "merged, above joint", "gained by the gate alone", "gained by mixing beyond that",
        "mixed, above joint", "part that the gate closes", "part that mixing adds",
        "lost if the gate is forgotten",
    ]  # fmt: skip
    note = (
        "Nats per byte. The gate alone and mixing have equally many tokens, both after the merge; "
        "what a merged model is worth before them is in the first column. Where a forgotten gate loses little, experts "
        "are still much alike, and no gate could be worth much."
    )
    return f"{note}\n\n{markdown_table(header, rows)}"


def distances(found: ApartFindings, text: Sharding) -> list[Estimate]:
    """Return the distances from merged to joint, of the gate alone, of mixing beyond it, and from mixed to joint."""
    merged, gate, mixed = merged_label(text), gate_label(text), mixed_label(text)
    steps = [(merged, JOINT), (merged, gate), (gate, mixed), (mixed, JOINT)]
    return [found.all.difference(one, other) for one, other in steps]


def participants_table(found: ApartFindings) -> str:
    """Each participant as a whole model, and their ensembles."""
    rows = []
    for text in found.shardings:
        alone = found.of("apart", text)
        sizes = [size for result in alone for size in result["bytes"]]
        together = [result["ensemble"] for result in alone if "ensemble" in result]
        cells = [_mean(together), _nats(result["even"] for result in together), _nats(together)] if together else []
        span = f"{min(sizes) / 1e6:.2f} to {max(sizes) / 1e6:.2f}"
        rows.append([TEXTS[text], span, _mean(alone), *(cells or ["-"] * 3)])
    header = [
        "texts", "M bytes of a text", "a participant at the merge", "a participant at the end",
        "ensemble, all alike", "ensemble, by likelihood so far",
    ]  # fmt: skip
    common = _nats(result["start"] for result in found.of("nothing"))
    note = f"Nats per byte on the same held-out text of all topics. The start in common: {common}."
    return f"{note}\n\n{markdown_table(header, rows)}"


def _mean(results: Sequence[Result]) -> str:
    return str(estimate([statistics.fmean(result["participants"]) for result in results], "seeds"))


def _nats(results: Iterator[Result] | Sequence[Result]) -> str:
    return str(estimate([result["nats_per_byte"] for result in results], "seeds"))


def cost_table(found: ApartFindings) -> str:
    """Training tokens, and what a byte costs afterwards."""
    course = found.course
    own = course.arm.experts // course.participants
    whole, part = cost(course), cost(replace(course, arm=replace(course.arm, experts=own)))
    rest = course.tokens - course.branch_tokens - course.apart_tokens
    rows: list[tuple[str, int, int, int, Cost]] = [
        (JOINT, course.tokens, 0, 1, whole),
        ("apart, merged", course.branch_tokens, course.apart_tokens, 1, whole),
        ("apart, gate learnt or mixed", course.branch_tokens + rest, course.apart_tokens, 1, whole),
        ("ensemble", course.branch_tokens, course.apart_tokens + rest, course.participants, part),
        (NOTHING, course.branch_tokens + rest, 0, 1, whole),
    ]
    cells = [
        [
            label, f"{together:,}", f"{alone:,}", f"{together + alone:,}", str(models),
            f"{models * of.flops_per_token / 1e6:.2f}", f"{models * of.parameters / 1e6:.2f}",
        ]
        for label, together, alone, models, of in rows
    ]  # fmt: skip
    header = [
        "arm", "tokens together", "tokens apart, all participants", "in all", "models for a byte",
        "MFLOPs a byte, forward", "parameters that they hold, M",
    ]  # fmt: skip
    return markdown_table(header, cells)


def load_note(course: BranchSchedule) -> str:
    """What makes dead experts of joint and of others hard to compare."""
    joint, others = course.steps - course.branch_step, course.steps - course.apart_step
    return (
        f"*Joint* was counted over {min(joint, WINDOW_STEPS)} steps, the others over {min(others, WINDOW_STEPS)}: an "
        "expert that few tokens reach is found dead more easily in fewer steps."
    )


def differences(found: ApartFindings) -> Figure:
    """A bar for each arm but joint and those whose gate knows nothing, which would dwarf the others."""
    hidden = {JOINT, *(forgotten_label(text) for text in TEXTS)}
    labels = [label for label in reversed(found.labels) if label not in hidden]
    gaps = [found.all.difference(label, JOINT) for label in labels]
    figure = Figure(figsize=(SIZE[0], 0.3 * len(labels) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(labels))
    axes.errorbar([gap.mean for gap in gaps], places, xerr=[gap.half_width for gap in gaps], fmt="o", capsize=3)
    axes.axvline(0.0, color="black", linewidth=1, label="joint")
    axes.set_yticks(places, labels)
    axes.set_xlabel("held-out nats per byte above joint")
    axes.grid(axis="x", alpha=0.3)
    return figure


def finding(found: ApartFindings) -> str:
    """Whether it holds, by the best of the texts that mean something; and what random ones do."""
    texts = [text for text in found.shardings if text != "random"] or found.shardings
    seeds = {text: len(found.all.results(mixed_label(text))) for text in texts}
    texts = [text for text in texts if seeds[text] == max(seeds.values())]
    best = min(texts, key=lambda text: found.all.mean(mixed_label(text)))
    mixed, gate = (found.all.difference(label(best), JOINT) for label in (mixed_label, gate_label))
    first = (
        f"{found.course.arm.label} that were trained apart {TEXTS[best]} and mixed at the end are {mixed.words} than "
        f"those trained together on as many tokens ({found.course.tokens:,}), and {gate.words} if only the gate learns"
    )
    words = [first]
    gap, *parts = distances(found, best)
    if gap.mean > gap.half_width:
        gate_share, mixing_share = (part.mean / gap.mean for part in parts[:2])
        words.append(
            f"of the distance from joint at the merge, {gap}, learning the gate alone closes {gate_share:.0%} and "
            f"mixing {mixing_share:.0%} more"
        )
    if ensemble_label(best) in found.labels:
        together = _against(found, ensemble_label(best), JOINT)
        words.append(f"an ensemble of the whole participants is {together} than joint")
    if "random" in found.shardings and best != "random":
        words.append(
            f"with texts cut at random, mixing is {_against(found, mixed_label('random'), mixed_label(best))} than "
            f"{TEXTS[best]}"
        )
    without = _against(found, mixed_label(best), NOTHING)
    words.append(f"mixed {TEXTS[best]} it is {without} than if the half that is spent apart is left out")
    return f"{verdict(mixed.low, mixed.high)}: {'; '.join(words)}."


def verdict(low: float, high: float) -> str:
    """Say what the interval of the difference from joint training decides."""
    if low > WORTH:
        return "It holds here"
    return "It does not hold" if high < WORTH else "It is not known"


def _against(found: ApartFindings, label: str, other: str) -> str:
    return found.all.difference(label, other).words

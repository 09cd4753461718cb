"""What the merging experiment's results say: tables, drawings, and whether what is searched for sticks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.figure import Figure

from experiments.experiment import Report, markdown_table
from experiments.statistics import Estimate, estimate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.arm import Cost
    from experiments.experiment import Result

BRANCH: Final = "the branch, before they part"
BEST: Final = "the best participant"
AVERAGE: Final = "average"
WEIGHTED: Final = "weighted average"
TASK_ARITHMETIC: Final = "task arithmetic"
TIES: Final = "TIES"
RANDOM: Final = "random by layer"
EVOLVED: Final = "evolved by layer"
POSTERIOR: Final = "ensemble by the posterior"
JOINT: Final = "trained jointly"
MERGES: Final = (AVERAGE, WEIGHTED, TASK_ARITHMETIC, TIES, EVOLVED, RANDOM)
SEARCHED: Final = (WEIGHTED, TASK_ARITHMETIC, TIES, EVOLVED)
"""What is meant to be wiser than the average, and than throwing."""

WORDS: Final = {"late": "parting late", "early": "parting early"}
TRAINING_PASSES: Final = 3
"""Training on a byte costs as much as running the model on so many."""

WIDE, HIGH = 9.0, 4.2


@dataclass(frozen=True, kw_only=True)
class MergingResults:
    """Of whole seeds, in their order; `apart` by when they part. `cost` of one model."""

    joint: Sequence[Result]
    apart: Mapping[str, Sequence[Result]]
    cost: Cost

    def nats(self, kind: str, way: str) -> list[float]:
        """Of a way, by seed."""
        if way == JOINT:
            return [result["nats"] for result in self.joint]
        return [result["ways"][way]["nats"] for result in self.apart[kind]]

    def wisest(self, kind: str) -> list[str]:
        """By seed, the searched merge that is best on the text to choose on."""
        return [
            min(SEARCHED, key=lambda way: ways[way]["chosen_nats"])
            for ways in (result["ways"] for result in self.apart[kind])
        ]

    def wisest_nats(self, kind: str) -> list[float]:
        """What these give."""
        pairs = zip(self.apart[kind], self.wisest(kind), strict=True)
        return [result["ways"][way]["nats"] for result, way in pairs]


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Pair by pair, over seeds; with one seed nothing is known of chance."""
    return estimate(np.subtract(ours, theirs), "seeds")


def merging_report(found: MergingResults) -> Report:
    """All of it."""
    tables = {}
    for kind in found.apart:
        tables[f"Loss, {WORDS[kind]}"] = _loss(found, kind)
    tables |= {
        "What it costs": _costs(found),
        "What was chosen": _chosen(found),
        "How far apart": _distances(found),
    }
    figures = {
        "ways": ("Held-out loss of each way above that of the joint model, with 95 % intervals", _by_way(found)),
        "search": ("The least loss on the text to choose on, by models measured, mean of the seeds", _searches(found)),
    }
    return Report(finding=_finding(found), tables=tables, figures=figures)


def _finding(found: MergingResults) -> str:
    sticks = [_sticks(found, kind) for kind in found.apart]
    if len(found.joint) == 1:
        verdict = "One seed cannot tell"
    elif all(sticks):
        verdict = "It is not: the merge that is chosen is better than the average and than as many random shares"
    elif any(sticks):
        kinds = " and ".join(WORDS[kind] for kind, holds in zip(found.apart, sticks, strict=True) if holds)
        verdict = f"Only in part: the merge that is chosen is better than the average and than random shares {kinds}"
    else:
        verdict = "Where one searches, it is: the merge that the text to choose on prefers is nowhere surely better "
        verdict += "than both the plain average and as many random shares"
    return f"{verdict}. {' '.join(_sentence(found, kind) for kind in found.apart)}"


def _sticks(found: MergingResults, kind: str) -> bool:
    """Whether the merge that the text to choose on prefers beats both, beyond chance."""
    nats = found.wisest_nats(kind)
    gaps = [difference(nats, found.nats(kind, null)) for null in (AVERAGE, RANDOM)]
    return all(gap.high < 0 for gap in gaps)


def _sentence(found: MergingResults, kind: str) -> str:
    average = found.nats(kind, AVERAGE)
    against = {
        "the branch": difference(average, found.nats(kind, BRANCH)),
        "the best participant": difference(average, found.nats(kind, BEST)),
        "joint training": difference(average, found.nats(kind, JOINT)),
    }
    parts = ", ".join(f"{gap.words} than {other}" for other, gap in against.items())
    search = difference(found.wisest_nats(kind), average)
    ensemble = difference(found.nats(kind, POSTERIOR), average)
    models = found.apart[kind][0]["ways"][POSTERIOR]["models"]
    return (
        f"{WORDS[kind].capitalize()}, the average is {parts}; the merge that was chosen "
        f"({_names(found, kind)}) is {search.words} than the average, and the participants as an ensemble by the "
        f"posterior, at {models:g} times the FLOPs, are {ensemble.words} than the average."
    )


def _names(found: MergingResults, kind: str) -> str:
    return ", ".join(dict.fromkeys(found.wisest(kind)))


def _loss(found: MergingResults, kind: str) -> str:
    rows = []
    for way in (*found.apart[kind][0]["ways"], JOINT):
        nats = found.nats(kind, way)
        gaps = [
            "" if way == other else str(difference(nats, found.nats(kind, other))) for other in (AVERAGE, JOINT, RANDOM)
        ]
        rows.append([way, str(estimate(nats, "seeds")), *gaps, _chosen_nats(found, kind, way)])
    header = ["way", "held-out nats per byte", "difference from the average", "from joint training"]
    header += ["from random by layer", "on the text to choose on"]
    note = "Mean of the seeds, with half widths of 95 % intervals over them. *One, in hindsight* is a bound, no way."
    return f"{note}\n\n{markdown_table(header, rows)}"


def _chosen_nats(found: MergingResults, kind: str, way: str) -> str:
    rows = [result["ways"].get(way, {}) for result in found.apart[kind]]
    return f"{np.mean([row['chosen_nats'] for row in rows]):.3f}" if "chosen_nats" in rows[0] else ""


def _costs(found: MergingResults) -> str:
    first = next(iter(found.apart.values()))[0]
    rows = []
    for way, row in first["ways"].items():
        read = row["evaluations"] * first["bytes_of_evaluation"]
        rows.append([
            way,
            str(row["evaluations"]),
            f"{read:,}",
            f"{read * found.cost.flops_per_token / 1e9:,.0f}",
            f"{read / TRAINING_PASSES:,.0f}",
            f"{row['models']:.2f}",
            f"{row['models'] * found.cost.flops_per_token / 1e6:.2f}",
        ])  # fmt: skip
    header = [
        "way", "models measured to choose it", "bytes run through a model for that", "GFLOPs",
        "as many bytes of training", "models run for a byte", "MFLOPs a byte, inference",
    ]  # fmt: skip
    note = (
        f"A model has {found.cost.parameters / 1e6:.2f} M parameters. Training on a byte costs as much as running a "
        f"model on {TRAINING_PASSES}. The joint model is run once for a byte, and nothing is measured to choose it."
    )
    return f"{note}\n\n{markdown_table(header, rows)}"


def _chosen(found: MergingResults) -> str:
    rows = [
        [WORDS[kind], way, str(seed), result["ways"][way]["chosen"]]
        for kind, results in found.apart.items()
        for way in (BEST, *MERGES[1:])
        for seed, result in enumerate(results)
    ]
    return markdown_table(["", "way", "seed", "chosen"], rows)


def _distances(found: MergingResults) -> str:
    rows = []
    for kind, results in found.apart.items():
        apart = [float(np.ptp(result["participants"])) for result in results]
        cells = [np.mean([result[key] for result in results]) for key in ("length", "cosine")]
        means = [float(np.mean(result["participants"])) for result in results]
        rows.append([WORDS[kind], *(f"{cell:.3f}" for cell in (*cells, np.mean(means), np.mean(apart)))])
    header = ["", "way of a participant, part of the branch's length", "cosine of two ways"]
    header += ["participants' held-out nats per byte, mean", "from best to worst"]
    return markdown_table(header, rows)


def _by_way(found: MergingResults) -> Figure:
    figure = Figure(figsize=(WIDE, HIGH), layout="constrained")
    panels = figure.subplots(1, len(found.apart), sharey=True, squeeze=False)[0]
    for axes, (kind, results) in zip(panels, found.apart.items(), strict=True):
        ways = list(results[0]["ways"])[::-1]
        gaps = [difference(found.nats(kind, way), found.nats(kind, JOINT)) for way in ways]
        axes.errorbar([gap.mean for gap in gaps], ways, xerr=[gap.half_width for gap in gaps], fmt="o", capsize=3)
        axes.axvline(0.0, linestyle="--", color="C1", label=JOINT)
        axes.set_title(WORDS[kind])
        axes.set_xlabel("nats per byte above joint training")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    return figure


def _searches(found: MergingResults) -> Figure:
    figure = Figure(figsize=(WIDE, HIGH), layout="constrained")
    panels = figure.subplots(1, len(found.apart), squeeze=False)[0]
    for axes, (kind, results) in zip(panels, found.apart.items(), strict=True):
        for way in (EVOLVED, RANDOM):
            curve = np.mean([result["ways"][way]["best_so_far"] for result in results], 0)
            axes.plot(np.arange(len(curve)) + 1, curve, label=way)
        axes.set_title(WORDS[kind])
        axes.set_xlabel("models measured")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("nats per byte on the text to choose on")
    panels[0].legend(fontsize="small")
    return figure

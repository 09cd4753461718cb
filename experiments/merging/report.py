"""What the merging experiment's results say: tables, drawings, and whether what is searched for sticks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.figure import Figure

from experiments.harness.experiment import Report, markdown_table
from experiments.harness.statistics import Estimate, estimate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.arms.arm import Cost
    from experiments.harness.experiment import Result

BEST: Final = "the best participant"
AVERAGE: Final = "average"
WEIGHTED: Final = "weighted average"
TASK_ARITHMETIC: Final = "task arithmetic"
TIES: Final = "TIES"
RANDOM: Final = "random by layer"
EVOLVED: Final = "evolved by layer"
POSTERIOR: Final = "ensemble by the posterior"
MERGES: Final = (AVERAGE, WEIGHTED, TASK_ARITHMETIC, TIES, EVOLVED, RANDOM)
SEARCHED: Final = (WEIGHTED, TASK_ARITHMETIC, TIES, EVOLVED)
"""What is meant to be wiser than the average, and than throwing."""

WIDE, HIGH = 9.0, 4.2


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What a page calls its rows and measures; keys are the results' own."""

    unit: str
    """The unit of text; a loss is in nats for each."""

    kinds: Mapping[str, str]
    """How its participants came to be apart, by kind of trial."""

    base: str
    """Row of what the participants began from; in a sentence it is `base_words`."""

    base_words: str
    together: Mapping[str, str]
    """Rows of what was trained on everything; the first is what the others are held against."""

    rivals: Mapping[str, str]
    """Ways that choose between the participants, with a verb; `models` is how many are run."""

    model: str
    training_passes: int
    """Training on a unit costs as much as running the model on so many."""

    length: str
    """Heading of how far participants went."""

    @property
    def nats(self) -> str:
        """Unit of a loss."""
        return f"nats per {self.unit}"

    @property
    def joint(self) -> str:
        """The row that others are held against."""
        return next(iter(self.together))


@dataclass(frozen=True, kw_only=True)
class MergingResults:
    """Results of whole seeds, in their order: `together` by row, `apart` by kind, and the `cost` of one model."""

    words: Wording
    together: Mapping[str, Sequence[Result]]
    apart: Mapping[str, Sequence[Result]]
    cost: Cost

    def nats(self, kind: str, way: str) -> list[float]:
        """Return the losses of a way, by seed."""
        if way in self.together:
            return [result["nats"] for result in self.together[way]]
        return [result["ways"][way]["nats"] for result in self.apart[kind]]

    def wisest(self, kind: str) -> list[str]:
        """Return for each seed the searched merge that is best on the text to choose on."""
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
        tables[f"Loss, {found.words.kinds[kind]}"] = _loss(found, kind)
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
    if len(found.together[found.words.joint]) == 1:
        verdict = "One seed cannot tell"
    elif all(sticks):
        verdict = "It is not: the merge that is chosen is better than the average and than as many random shares"
    elif any(sticks):
        kinds = " and ".join(found.words.kinds[kind] for kind, holds in zip(found.apart, sticks, strict=True) if holds)
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
    words, average = found.words, found.nats(kind, AVERAGE)
    others = {words.base: words.base_words, BEST: "the best participant", **words.together}
    against = ", ".join(
        f"{difference(average, found.nats(kind, way)).words_in(words.nats)} than {name}" for way, name in others.items()
    )
    search = difference(found.wisest_nats(kind), average).words_in(words.nats)
    chosen = f"the merge that was chosen ({_names(found, kind)}) is {search} than the average"
    *rivals, last = (_rival(found, kind, way) for way in words.rivals)
    rest = f"{', '.join([chosen, *rivals])}, and {last}"
    return f"{words.kinds[kind].capitalize()}, the average is {against}; {rest}."


def _rival(found: MergingResults, kind: str, way: str) -> str:
    """A way that keeps the participants as they are, held against their average."""
    gap = difference(found.nats(kind, way), found.nats(kind, AVERAGE)).words_in(found.words.nats)
    words = found.words.rivals[way].format(models=f"{found.apart[kind][0]['ways'][way]['models']:g}")
    return f"{words} {gap} than the average"


def _names(found: MergingResults, kind: str) -> str:
    return ", ".join(dict.fromkeys(found.wisest(kind)))


def _loss(found: MergingResults, kind: str) -> str:
    rows = []
    joint = found.words.joint
    for way in (*found.apart[kind][0]["ways"], *found.together):
        nats = found.nats(kind, way)
        gaps = [
            "" if way == other else str(difference(nats, found.nats(kind, other))) for other in (AVERAGE, joint, RANDOM)
        ]
        rows.append([way, str(estimate(nats, "seeds")), *gaps, _chosen_nats(found, kind, way)])
    header = ["way", f"held-out {found.words.nats}", "difference from the average"]
    header += [f"from {found.words.together[joint]}"]
    header += ["from random by layer", "on the text to choose on"]
    note = "Mean of the seeds, with half widths of 95 % intervals over them. *One, in hindsight* is a bound, no way."
    return f"{note}\n\n{markdown_table(header, rows)}"


def _chosen_nats(found: MergingResults, kind: str, way: str) -> str:
    rows = [result["ways"].get(way, {}) for result in found.apart[kind]]
    return f"{np.mean([row['chosen_nats'] for row in rows]):.3f}" if "chosen_nats" in rows[0] else ""


def _costs(found: MergingResults) -> str:
    first, words = next(iter(found.apart.values()))[0], found.words
    flops = found.cost.flops_per_token
    rows = []
    for way, row in first["ways"].items():
        read = row["evaluations"] * first[f"{words.unit}s_of_evaluation"]
        rows.append([
            way,
            str(row["evaluations"]),
            f"{read:,}",
            f"{read * flops / 1e9:,.0f}",
            f"{read / words.training_passes:,.0f}",
            f"{row['models']:.2f}",
            f"{row['models'] * flops / 1e6:.2f}",
        ])  # fmt: skip
    unit = words.unit
    header = [
        "way", "models measured to choose it", f"{unit}s run through a model for that", "GFLOPs",
        f"as many {unit}s of training", f"models run for a {unit}", f"MFLOPs a {unit}, inference",
    ]  # fmt: skip
    note = (
        f"{words.model} has {found.cost.parameters / 1e6:.2f} M parameters. Training on a {unit} costs as much as "
        f"running a model on {words.training_passes}. What is trained jointly is run once for a {unit}, and nothing is "
        "measured to choose it."
    )
    return f"{note}\n\n{markdown_table(header, rows)}"


def _chosen(found: MergingResults) -> str:
    rows = [
        [found.words.kinds[kind], way, str(seed), result["ways"][way]["chosen"]]
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
        rows.append([found.words.kinds[kind], *(f"{cell:.3f}" for cell in (*cells, np.mean(means), np.mean(apart)))])
    header = ["", found.words.length, "cosine of two ways"]
    header += [f"participants' held-out {found.words.nats}, mean", "from best to worst"]
    return markdown_table(header, rows)


def _by_way(found: MergingResults) -> Figure:
    figure = Figure(figsize=(WIDE, HIGH), layout="constrained")
    joint = found.words.joint
    panels = figure.subplots(1, len(found.apart), sharey=True, squeeze=False)[0]
    for axes, (kind, results) in zip(panels, found.apart.items(), strict=True):
        ways = list(results[0]["ways"])[::-1]
        gaps = [difference(found.nats(kind, way), found.nats(kind, joint)) for way in ways]
        axes.errorbar([gap.mean for gap in gaps], ways, xerr=[gap.half_width for gap in gaps], fmt="o", capsize=3)
        axes.axvline(0.0, linestyle="--", color="C1", label=joint)
        axes.set_title(found.words.kinds[kind])
        axes.set_xlabel(f"{found.words.nats} above {found.words.together[joint]}")
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
        axes.set_title(found.words.kinds[kind])
        axes.set_xlabel("models measured")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{found.words.nats} on the text to choose on")
    panels[0].legend(fontsize="small")
    return figure

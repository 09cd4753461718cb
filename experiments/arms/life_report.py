"""The part of a page that tells how experts live: tables and plots of what `experiments.arms.life` has found."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from experiments.harness.experiment import markdown_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from experiments.arms.arms import ArmResults
    from experiments.harness.experiment import Result

    Gate = Mapping[str, float]

SIZE = (10.0, 6.4)

TRAITS: dict[str, Callable[[Gate], float]] = {
    "dead experts, %": lambda gate: 100 * gate["dead_fraction"],
    "spread of the load (CV)": lambda gate: gate["load_cv"],
    "busiest over mean": lambda gate: gate["load_max_over_mean"],
    "entropy of the load, % of even": lambda gate: (
        100 * gate["load_entropy_bits"] / max(1.0, math.log2(gate["n_live"]))
    ),
    "effective experts of a token": lambda gate: gate["effective_k"],
    "experts kept since a quarter before, %": lambda gate: 100 * gate["kept_fraction"],
}
KEPT = "experts kept since a quarter before, %"

LIFE_NOTE = """\
By quarters of the training, each over the last 100 steps before its end, mean of layers and seeds. Kept are those of a
held-out token's experts that were its own a quarter before: an expert cannot become good at tokens that do not come
back. The effective experts of a token are 1 / the sum of its weights' squares. Uneven load costs hosts: where each
has as many blocks, a step waits for the one with the busiest. Its load at the end of the training is told over the mean
block's, for as many blocks as a block has experts."""

ABLATION_NOTE = """\
What held-out nats per byte rise by when some experts of every layer do not answer, mean of the seeds; a token that had
them makes do with its others. In brackets, in thousandths of a nat, what that is for each expert of a layer."""


def life_tables(found: ArmResults) -> dict[str, str]:
    """Tables of arms whose results say how their experts lived; none where no result does."""
    labels = living(found)
    if not labels:
        return {}
    return {"How experts live": life_table(found, labels), "What experts are worth": ablation_table(found, labels)}


def living(found: ArmResults) -> list[str]:
    """Return the arms of which all results have the gates' statistics over time: older ones do not."""
    return [label for label in found.labels if all(result.get("life") for result in found.results(label))]


def life_table(found: ArmResults, labels: list[str]) -> str:
    """What the gates chose in each quarter, an arm to a line."""
    rows = []
    for label in labels:
        results = found.results(label)
        cells = [" ".join(f"{value:.3g}" for value in course(results, name)) for name in TRAITS]
        busiest = statistics.fmean(ratio for result in results for ratio in result["busiest_block"])
        rows.append([label, *cells, f"{busiest:.2f}"])
    return f"{LIFE_NOTE}\n\n{markdown_table(['arm', *TRAITS, 'busiest block over mean'], rows)}"


def course(results: list[Result], trait: str) -> list[float]:
    """Return a trait at each look, mean of layers and seeds; what is kept has no value at the first."""
    of, looks = TRAITS[trait], [result["life"] for result in results]
    at_each = [[layer for look in at_once for layer in look["layers"]] for at_once in zip(*looks, strict=True)]
    if trait == KEPT:  # a run that was cut has nothing to compare the first look after that with
        at_each = [[layer for layer in layers if layer["kept_fraction"] is not None] for layers in at_each[1:]]
    return [statistics.fmean(map(of, layers)) if layers else math.nan for layers in at_each]


def ablation_table(found: ArmResults, labels: list[str]) -> str:
    """What is lost without some experts, an arm to a line."""
    kinds = [ablation["taken"] for ablation in found.results(labels[0])[0]["ablated"]]
    rows = []
    for label in labels:
        results = found.results(label)
        cells = []
        for index in range(len(kinds)):
            rise = statistics.fmean(result["ablated"][index]["nats"] for result in results)
            each = 1000 * rise / results[0]["ablated"][index]["experts"]
            cells.append(f"{rise:.4f} ({each:.3g})")
        rows.append([label, *cells])
    return f"{ABLATION_NOTE}\n\n{markdown_table(['arm', *kinds], rows)}"


def life_figures(found: ArmResults) -> dict[str, tuple[str, Figure]]:
    """A small plot for each trait by tokens; none where no result says how experts lived."""
    if not (labels := living(found)):
        return {}
    return {"life": ("How experts live, by tokens: mean of layers and seeds", life_figure(found, labels))}


def life_figure(found: ArmResults, labels: list[str]) -> Figure:
    """One curve for each arm in each small plot."""
    figure = Figure(figsize=SIZE, layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, TRAITS, strict=True):
        for label in labels:
            values = course(found.results(label), name)
            tokens = np.mean([[look["tokens"] for look in result["life"]] for result in found.results(label)], 0)
            axes.plot(tokens[-len(values) :], values, marker=".", label=label)
        axes.set_title(name, fontsize="small")
        axes.set_xlabel("tokens", fontsize="small")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize="small")
    return figure

"""Tables and plots of experiments that train arms."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from experiments.arms.life_report import life_figures, life_tables
from experiments.harness.experiment import markdown_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

    from experiments.arms.arm import Arm
    from experiments.arms.arms import ArmResults
    from experiments.harness.experiment import Result

WORTH_MORE = 0.01
"""Nats per byte: four times the experts that gain less than that are no longer worth it."""

LOAD_TRAITS = ("n_live", "dead_fraction", "load_cv", "load_max_over_mean", "load_entropy_bits")

MANY_DEAD = 0.05
"""Part of the experts from which a page says so."""

STATE_VALUES = 3
"""The float32 values per parameter: itself and two moments."""

SIZE = (7.0, 4.2)
LOSS = "held-out nats per byte"


def arms_tables(found: ArmResults, against: str) -> dict[str, str]:
    """Loss, cost, load, life and specialisation by arm."""
    tables = {"Loss": loss_table(found, against), "What it costs": cost_table(found, against)}
    if any(result["gates"] for label in found.labels for result in found.results(label)):
        tables |= {"Load": load_table(found), **life_tables(found), "Specialisation": specialisation_table(found)}
    return tables


def saturation(found: ArmResults, ladder: Sequence[Arm]) -> str:
    """Say from which number of experts on more of them gain little; `ladder` are arms of more and more."""
    known = [arm for arm in ladder if arm.label in found.labels]
    for few, more in itertools.pairwise(known):
        if found.mean(few.label) - found.mean(more.label) < WORTH_MORE:
            return f"from {few.experts:,} to {more.experts:,} experts the gain is under {WORTH_MORE:g}"
    return f"more experts helped up to the most that were tried, {known[-1].experts:,}"


def loss_table(found: ArmResults, against: str) -> str:
    """Held-out loss, and the paired difference from one arm."""
    rows = []
    for label in found.labels:
        gap = "" if label == against else str(found.difference(label, against))
        n_seeds = len(found.results(label))
        rows.append([label, f"{found.spec(label).lr:g}", str(n_seeds), str(found.nats(label)), gap])
    header = ["arm", "rate", "seeds", f"{LOSS} at the end", f"difference from {against}"]
    note = "Half widths of 95 % intervals, over seeds; for a difference with one seed, over windows."
    return f"{note}{edge_words(found)}\n\n{markdown_table(header, rows)}"


def edge_words(found: ArmResults) -> str:
    """Which arms might learn better at a rate that was not tried."""
    rates = sorted(found.rates_tried)
    labels = [label for label in found.labels if found.spec(label).lr in (rates[:1] + rates[-1:])]
    return f" Best at an end of the rates that were tried, so perhaps not tuned: {'; '.join(labels)}." if labels else ""


def cost_table(found: ArmResults, against: str) -> str:
    """Parameters, FLOPs, memory, speed, and the tokens it takes to be as good as one arm is at its end."""
    goal = found.mean(against)
    rows = []
    for label in found.labels:
        cost, results = found.cost(label), found.results(label)
        reached = [tokens_to(result, goal) for result in results]
        rows.append([
            label,
            f"{cost.parameters / 1e6:.2f}",
            f"{cost.active_parameters / 1e6:.2f}",
            f"{cost.flops_per_token / 1e6:.2f}",
            f"{cost.gate_flops_per_token / cost.flops_per_token:.0%}",
            f"{cost.parameters * 4 * STATE_VALUES / 1e6:,.0f}",
            f"{statistics.median(result['tokens'] / result['cpu_seconds'] for result in results):,.0f}",
            "not reached" if None in reached else f"{np.mean([t for t in reached if t]) / 1e6:.2f}",
        ])  # fmt: skip
    header = [
        "arm", "parameters, M", "active, M", "MFLOPs a token, forward", "of it the gates", "weights and moments, MB",
        "tokens per CPU second", f"M tokens until as good as {against}",
    ]  # fmt: skip
    note = "Processor seconds are of whole training steps, on one thread."
    return f"{note}\n\n{markdown_table(header, rows)}"


def tokens_to(result: Result, goal: float) -> float | None:
    """Tokens at which the held-out curve first meets `goal`, by interpolation; None if it does not."""
    points: list[tuple[float, float]] = [(0.0, math.inf), *result["held_out"]]
    for (before, worse), (after, better) in itertools.pairwise(points):
        if better <= goal:
            part = 1.0 if math.isinf(worse) else (worse - goal) / (worse - better)
            return before + part * (after - before)
    return None


def load_table(found: ArmResults) -> str:
    """How evenly experts are used at the end of training: mean over layers and seeds."""
    return load_table_of(
        {label: [gate for result in found.results(label) for gate in result["gates"]] for label in _with_experts(found)}
    )


def load_table_of(gates_by_arm: Mapping[str, Sequence[Result]]) -> str:
    """Make the table of load from the gates' statistics, by arm."""
    rows, unused = [], []
    for label, gates in gates_by_arm.items():
        mean = {trait: statistics.fmean(gate[trait] for gate in gates) for trait in LOAD_TRAITS}
        even = np.log2(mean["n_live"])
        if mean["dead_fraction"] > MANY_DEAD:
            unused.append(label)
        rows.append([
            label,
            f"{mean['dead_fraction']:.1%}",
            f"{mean['load_cv']:.2f}",
            f"{mean['load_max_over_mean']:.1f}",
            f"{mean['load_entropy_bits']:.2f} of {even:.2f}",
        ])  # fmt: skip
    header = ["arm", "dead experts", "spread of the load (CV)", "busiest over mean", "entropy of the load, bits"]
    note = "Over the last 100 steps, mean over layers. A dead expert was not chosen once in them."
    if unused:
        note += f" Many are dead in: {'; '.join(unused)}. What these lose may be the gate's doing, not the experts'."
    return f"{note}\n\n{markdown_table(header, rows)}"


def specialisation_table(found: ArmResults) -> str:
    """Mutual information of experts and labels, over that with shuffled labels."""
    rows = []
    for label in _with_experts(found):
        cells = [label]
        for name in ("byte class", "topic"):
            layers = [layer for result in found.results(label) for layer in result["specialisation"][name]]
            bits, null = (statistics.fmean(layer[key] for layer in layers) for key in ("bits", "shuffled_bits"))
            spread = max(layer["shuffled_std"] for layer in layers)
            cells += [f"{bits:.3f}", f"{null:.3f} ± {spread:.3f}"]
        rows.append(cells)
    header = ["arm", "byte class, bits", "shuffled", "topic of the article, bits", "shuffled"]
    note = "Mutual information between a token's experts and what it is, on held-out text, mean over layers."
    return f"{note}\n\n{markdown_table(header, rows)}"


def _with_experts(found: ArmResults) -> list[str]:
    return [label for label in found.labels if found.spec(label).arm.experts]


def arms_figures(found: ArmResults) -> dict[str, tuple[str, Figure]]:
    """Loss by experts, by tokens, by FLOPs."""
    return {
        "experts": ("Held-out loss by the number of experts, with 95 % intervals over seeds", by_experts(found)),
        "tokens": ("Held-out loss by tokens, mean of the seeds", by_progress(found, "tokens", lambda _: 1.0)),
        "flops": (
            "Held-out loss by training FLOPs, the gates' counted, mean of the seeds",
            by_progress(found, "training FLOPs", lambda label: 3.0 * found.cost(label).flops_per_token),
        ),
        **life_figures(found),
    }


def by_experts(found: ArmResults) -> Figure:
    """Arms with experts as points, dense ones as lines across."""
    labels = _with_experts(found)
    figure, axes = _across(found, labels, [found.spec(label).arm.experts for label in labels])
    _finish(axes, "experts of a layer")
    return figure


def by_size(found: ArmResults, nulls: Sequence[Arm]) -> Figure:
    """Arms with experts as points; dense ones and `nulls` as lines across."""
    apart = {arm.label for arm in nulls}
    shown = [label for label in _with_experts(found) if label not in apart]
    figure, axes = _across(found, shown, [found.spec(label).arm.hidden for label in shown])
    _finish(axes, "hidden width of an expert")
    return figure


def _across(found: ArmResults, points: Sequence[str], x: Sequence[int]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    nats = [found.nats(label) for label in points]
    axes.errorbar(x, [n.mean for n in nats], yerr=[n.half_width for n in nats], marker="o", capsize=3, label="experts")
    for index, label in enumerate(label for label in found.labels if label not in points):
        axes.axhline(found.mean(label), linestyle=("--", ":", "-.")[index % 3], color=f"C{index + 1}", label=label)
    axes.set_xscale("log", base=2)
    return figure, axes


def by_progress(found: ArmResults, words: str, unit: Callable[[str], float]) -> Figure:
    """A curve for each arm; the start, where all are alike, is left out."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for label in found.labels:
        curves = [np.array(result["held_out"]) for result in found.results(label)]
        tokens_X, nats_X = np.mean([curve[:, 0] for curve in curves], 0), np.mean([curve[:, 1] for curve in curves], 0)
        style = "-" if found.spec(label).arm.experts else "--"
        axes.plot(tokens_X * unit(label), nats_X, style, marker=".", label=label)
    _finish(axes, words)
    return figure


def _finish(axes: Axes, words: str) -> None:
    axes.set_xlabel(words)
    axes.set_ylabel(LOSS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

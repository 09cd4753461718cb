"""What `inspect` draws: how load is spread, what experts tell of topics, and what is lost without groups of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from node.model.transformer import bits_per_byte

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from node.trainer.inspection.findings import Findings

HEIGHT_INCHES, PANEL_INCHES = 4.0, 4.6
BAR_INCHES = 0.25
LAYERS_IN_A_COLUMN = 12
"""Of the legend."""

MAX_POINTS = 2_000


def figure_of(found: Findings, bytes_per_token: float) -> Figure:
    """A panel for loads, and one each for topics and for what is lost, where that was measured."""
    has_topics = any(layer.about_topics is not None for layer in found.layers)
    panels = 1 + has_topics + bool(found.groups)
    height = max(HEIGHT_INCHES, BAR_INCHES * len(found.groups))
    figure = Figure(figsize=(PANEL_INCHES * panels, height), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    _draw_loads(next(axes), found)
    if has_topics:
        _draw_information(next(axes), found)
    if found.groups:
        _draw_groups(next(axes), found, bytes_per_token)
    return figure


def _draw_loads(axes: Axes, found: Findings) -> None:
    for layer in found.layers:
        loads = np.sort(np.array(layer.loads, dtype=np.float64))[::-1]
        kept = np.unique(np.linspace(0, len(loads) - 1, min(MAX_POINTS, len(loads))).astype(np.int64))
        ranks = (kept + 1) / len(loads) * 100
        axes.plot(ranks, loads[kept] / max(loads.mean(), 1e-12), label=f"layer {layer.layer}")
    axes.axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_title("load over the layer's mean", fontsize="small")
    axes.set_xlabel("experts from the busiest on, %", fontsize="small")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", ncols=1 + len(found.layers) // LAYERS_IN_A_COLUMN)


def _draw_information(axes: Axes, found: Findings) -> None:
    known = [(layer.layer, layer.about_topics) for layer in found.layers if layer.about_topics is not None]
    numbers = np.arange(len(known))
    axes.bar(numbers, [about.bits for _, about in known], color="C0", label="true topics")
    middle = [about.by_chance for _, about in known]
    spread = [[about.by_chance - about.low for _, about in known], [about.high - about.by_chance for _, about in known]]
    axes.errorbar(numbers, middle, yerr=np.abs(spread), fmt="o", color="C1", capsize=4, label="shuffled, 95 %")
    axes.set_xticks(numbers, [str(number) for number, _ in known], fontsize="small")
    axes.set_xlabel("layer", fontsize="small")
    axes.margins(y=0.3)  # room for the legend
    axes.set_title(f"bits that experts tell of {len(found.topics)} topics", fontsize="small")
    axes.legend(frameon=False, fontsize="small")


def _draw_groups(axes: Axes, found: Findings, bytes_per_token: float) -> None:
    names = [group.taken for group in found.groups]
    more, half = (
        [bits_per_byte(nats, bytes_per_token) for nats in values]
        for values in ([g.rise.nats for g in found.groups], [g.rise.half_width for g in found.groups])
    )
    axes.barh(names, more, xerr=half, color="C2", capsize=3)
    axes.invert_yaxis()
    axes.axvline(0.0, color="#999999", linewidth=0.8)
    axes.set_title("bits per byte lost without experts", fontsize="small")
    axes.tick_params(axis="y", labelsize="small")

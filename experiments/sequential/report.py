"""What the sequential experiment's results say: tables, a drawing, and one sentence that they decide."""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from experiments.harness.experiment import Report, markdown_table
from experiments.sequential.updates import KINDS, rate_bound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from experiments.harness.experiment import Result

WIDE, HIGH = 9.0, 3.6
ALPHA = 0.05
WANTED_NULLS = 200
EARLY = 0.5
"""The share of the held-out text that counts as early: at its end every mean is known."""
EDGES = (0.0, 0.003, 0.006, 0.0125, 0.025, 0.05, 0.1, float("inf"))
"""Gains, in nats per byte, times the experts of the layer."""
COLOURS = {"accept": "tab:green", "reject": "tab:red", "undecided": "tab:grey"}


def sequential_report(results: Sequence[Result]) -> Report:
    """Report on all models together."""
    updates = [_with_model(update, result) for result in results for update in result["updates"]]
    nulls = [update for update in updates if update["gain"] <= 0.0]
    gains = [update for update in updates if update["gain"] > 0.0]
    tables = {
        "False accepts": _false_accepts(nulls),
        "Power, and tokens to a decision, by true gain": _power(gains),
        "Tokens to a decision": _tokens(nulls, gains),
        "Agreement with the whole held-out text": _agreement(updates),
        "Models": _models(results),
    }
    return Report(finding=_finding(nulls, gains), tables=tables, figures={"decisions": _drawing(updates)})


def _with_model(update: Result, result: Result) -> Result:
    return {
        **update,
        "layer_gain": update["gain"] * result["experts"],
        "experts": result["experts"],
        "tokens": update["windows"] * result["context"],
        "all_tokens": result["windows"] * result["context"],
        "touched_tokens": update["touched"]["windows"] * result["context"],
    }


def _finding(nulls: Sequence[Result], gains: Sequence[Result]) -> str:
    accepted = max(_count(nulls, "accept"), sum(update["without_worth"] == "accept" for update in nulls))
    rate = accepted / max(1, len(nulls))
    worth = [update for update in gains if update["gain"] >= update["worth"]]
    found, early = _count(worth, "accept"), _accepted_within(worth, EARLY)
    share = median(_shares(worth)) if worth else 1.0
    if len(nulls) < WANTED_NULLS:
        return (
            f"It is not known: only {len(nulls)} updates without gain were tested, of {WANTED_NULLS} that are wanted."
        )
    if rate > ALPHA:
        return f"It cannot: {accepted} of {len(nulls)} updates without gain were accepted, {rate:.1%}, more than 5%."
    outcome = (
        f"{accepted} of {len(nulls)} updates without gain were accepted ({rate:.1%}), and {found} of {len(worth)} "
        f"that are worth having, {early} of these within half of the held-out text (median {share:.0%})."
    )
    return ("It can: " if 2 * early > len(worth) else "It hardly can: ") + outcome


def _false_accepts(nulls: Sequence[Result]) -> str:
    rows = [_null_row(words, [u for u in nulls if u["kind"] == kind]) for kind, words in KINDS.items()]
    header = ["true gain at most 0", "updates", "accepted", "rejected", "rate", "95% bound", "accepted with worth 0"]
    return markdown_table([*header, "accepted by t tests after each window"], [*rows, _null_row("all", nulls)])


def _null_row(words: str, nulls: Sequence[Result]) -> list[str]:
    n, accepted = len(nulls), _count(nulls, "accept")
    peeked = sum(update["peeking"] is not None for update in nulls)
    unhurried = sum(update["without_worth"] == "accept" for update in nulls)
    bound = f"{rate_bound(accepted, n):.1%}" if n else "-"
    rates = [_percent(accepted, n), bound, _percent(unhurried, n), _percent(peeked, n)]
    return [words, str(n), str(accepted), str(_count(nulls, "reject")), *rates]


def _power(gains: Sequence[Result]) -> str:
    rows = []
    for low, high in pairwise(EDGES):
        own = [u for u in gains if low < u["layer_gain"] <= high]
        if own:
            words = f"{low:g} to {high:g}" if high < EDGES[-1] else f"more than {low:g}"
            worse = sum("became worse" in update["why"] for update in own)
            within = [_percent(_accepted_within(own, share), len(own)) for share in (EARLY / 2, EARLY, 1.0)]
            counts = [str(len(own)), *within, str(_count(own, "reject")), str(worse)]
            rows.append([words, *counts, f"{median(u['tokens'] for u in own):,.0f}", f"{median(_shares(own)):.0%}"])
    header = ["gain x experts, nats per byte", "updates", "accepted within a quarter of the text", "within half"]
    header += ["by its end", "rejected", "of these for one window", "tokens, median", "of the held-out text"]
    return markdown_table(header, rows)


def _tokens(nulls: Sequence[Result], gains: Sequence[Result]) -> str:
    rows = []
    for experts in sorted({update["experts"] for update in (*nulls, *gains)}):
        for words, of in (("at most 0", nulls), ("above 0", gains)):
            own = [update for update in of if update["experts"] == experts]
            if own:
                columns = ("all_tokens", "tokens", "touched_tokens", "tokens_reached")
                medians = [f"{median(update[column] for update in own):,.0f}" for column in columns]
                rows.append([str(experts), words, str(len(own)), *medians])
    header = ["experts", "true gain", "updates", "whole text", "to a decision", "windows with the expert only"]
    return markdown_table([*header, "tokens that reached it"], rows)


def _agreement(updates: Sequence[Result]) -> str:
    cases: dict[str, Callable[[Result], bool]] = {
        "at most 0": lambda u: u["gain"] <= 0.0,
        "above 0, less than worth": lambda u: 0.0 < u["gain"] < u["worth"],
        "worth having": lambda u: u["gain"] > 0.0 and u["gain"] >= u["worth"],
    }
    rows = []
    for words, holds in cases.items():
        own = [update for update in updates if holds(update)]
        rows.append([words, str(len(own)), *(_percent(_count(own, verdict), len(own)) for verdict in COLOURS)])
    return markdown_table(["gain over the whole held-out text", "updates", *(f"{v}" for v in COLOURS)], rows)


def _models(results: Sequence[Result]) -> str:
    rows = [
        [str(r["experts"]), f"{r['bits_per_byte']:.3f}", f"{r['windows'] * r['context']:,}", str(len(r["updates"]))]
        for r in results
    ]
    return markdown_table(["experts of a layer", "held-out bits per byte", "held-out tokens", "updates"], rows)


def _drawing(updates: Sequence[Result]) -> tuple[str, Figure]:
    figure = Figure(figsize=(WIDE, HIGH), layout="constrained")
    left, right = figure.subplots(1, 2)
    for verdict, colour in COLOURS.items():
        own = [update for update in updates if update["verdict"] == verdict]
        gains = [update["layer_gain"] for update in own]
        # As pixels: thousands of points would be most of the drawing's bytes.
        left.scatter(gains, _shares(own), s=8, alpha=0.6, color=colour, label=verdict, rasterized=True)
    left.set_xscale("symlog", linthresh=0.01)
    left.set_xlabel("true gain x experts, nats per byte")
    left.set_ylabel("share of the held-out text to a decision")
    left.set_ylim(0, 1.05)
    left.legend(fontsize="small")
    _draw_power(right, [update for update in updates if update["gain"] > 0.0])
    return (
        "Share of the held-out text that the test needed, and how often it accepted within half of it, by true gain.",
        figure,
    )


def _draw_power(axes: Axes, gains: Sequence[Result]) -> None:
    for experts in sorted({update["experts"] for update in gains}):
        points = {}
        for low, high in pairwise(EDGES):
            own = [u for u in gains if u["experts"] == experts and low < u["layer_gain"] <= high]
            if own:
                points[median(u["layer_gain"] for u in own)] = _accepted_within(own, EARLY) / len(own)
        axes.plot(list(points), list(points.values()), marker="o", label=f"{experts} experts")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("true gain x experts, nats per byte")
    axes.set_ylabel("accepted within half of the text")
    if gains:
        axes.legend(fontsize="small")


def _shares(updates: Sequence[Result]) -> list[float]:
    return [update["tokens"] / update["all_tokens"] for update in updates]


def _accepted_within(updates: Sequence[Result], share: float) -> int:
    return sum(u["verdict"] == "accept" and u["tokens"] <= share * u["all_tokens"] for u in updates)


def _count(updates: Sequence[Result], verdict: str) -> int:
    return sum(update["verdict"] == verdict for update in updates)


def _percent(n_found: int, n: int) -> str:
    return f"{n_found / n:.1%}" if n else "-"

"""What the swarm experiment's results say: tables, drawings, and a sentence that they decide."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from experiments.arms.report import LOSS, SIZE, load_table, specialisation_table
from experiments.harness.experiment import Report, markdown_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from experiments.arms.arms import ArmResults
    from experiments.harness.experiment import Result
    from experiments.harness.statistics import Estimate

CLOSE = 0.02
"""Nats per byte: a swarm that is not worse than this is not far from one process."""

KB, MB = 1e3, 1e6
NOT_APPLICABLE = "-"


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which arm is which, by label.

    All are held against `one`; `late` is its twin with late gradients, `remedies` are twins of that one that might take
    back what late gradients cost, `in_turn` is a swarm without them, `quiet` a swarm with them that nothing disturbs,
    `worst` the same with every disturbance.
    """

    one: str
    late: str
    remedies: tuple[str, ...]
    in_turn: str
    quiet: str
    worst: str


def swarm_report(found: ArmResults, roles: Roles) -> Report:
    """Tables, drawings, and how far the swarms are from one process."""
    one = roles.one
    tables = {
        "Loss": loss_table(found, (one, roles.late, roles.quiet)),
        "Calls and experts": calls_table(found),
        "Late gradients and replicas apart": staleness_table(found),
        "What it costs": cost_table(found, one),
        "Load": load_table(found),
        "Specialisation": specialisation_table(found),
    }
    figures = {
        "differences": (f"Difference of the held-out loss from {one}, with 95 % intervals", differences(found, one)),
        "tokens": ("Training loss by tokens, mean of the seeds", by_tokens(found)),
    }
    return Report(finding=finding(found, roles), tables=tables, figures=figures)


def finding(found: ArmResults, roles: Roles) -> str:
    """Whether the swarm that suffers most ends near one process; what of the gap is there without the suffering."""
    one, worst = roles.one, roles.worst
    gap = found.difference(worst, one)
    if gap.high <= CLOSE:
        verdict = "It is not far in loss"
    elif gap.low > CLOSE:
        verdict = "It is far in loss"
    else:
        verdict = f"It is not known whether it is within {CLOSE:g} nats per byte"
    quiet, in_turn, late = (_signed(found.difference(arm, one)) for arm in (roles.quiet, roles.in_turn, roles.late))
    times = cpu_per_million(found, worst) / cpu_per_million(found, one)
    sent = fmean(result["wire_bytes"] / result["tokens"] for result in found.results(worst)) / found.spec(one).layers
    remedied = "".join(
        f", {arm.removeprefix(f'{roles.late}, ')} by {_signed(found.difference(arm, one))}" for arm in roles.remedies
    )
    return (
        f"{verdict}: after {found.spec(one).tokens:,} tokens a swarm whose calls are late and fail and whose hosts die "
        f"differs by {_signed(gap)} nats per byte from one process, a swarm that nothing disturbs by {quiet}, and a "
        f"swarm without late gradients by {in_turn}; one process with late gradients differs by {late}"
        f"{remedied}. The worst "
        f"swarm takes {times:.1f} times the processor time, and sends {sent / KB:.1f} kB for a token and layer."
    )


def _signed(gap: Estimate) -> str:
    return f"+{gap}" if gap.mean > 0 else str(gap)


def loss_table(found: ArmResults, against: Sequence[str]) -> str:
    """Held-out loss, and the paired differences from some arms."""
    rows = []
    for label in found.labels:
        gaps = ["" if label == other else str(found.difference(label, other)) for other in against]
        rows.append([label, str(len(found.results(label))), str(found.nats(label)), *gaps])
    header = ["arm", "seeds", f"{LOSS} at the end", *(f"difference from {other}" for other in against)]
    note = "Half widths of 95 % intervals, over seeds; for a difference with one seed, over windows."
    return f"{note}\n\n{markdown_table(header, rows)}"


def calls_table(found: ArmResults) -> str:
    """How much of what the gate wanted did not happen."""
    rows = []
    for label in found.labels:
        results = found.results(label)
        pairs = [result["pairs"] for result in results]
        rows.append([
            label,
            _of_swarm(results, lambda r: r["calls_ok"] + r["calls_failed"], "{:,.0f}"),
            _of_swarm(results, lambda r: r["calls_failed"] / (r["calls_ok"] + r["calls_failed"]), "{:.1%}"),
            _of_swarm(results, lambda r: r["kills"], "{:.1f}"),
            _of_swarm(results, lambda r: r["waits"], "{:.1f}"),
            f"{fmean(1 - p['live'] / p['experts'] for p in pairs):.2%}",
            f"{fmean(1 - p['answered'] / p['chosen'] for p in pairs):.2%}",
            f"{fmean(1 - p['returned'] / p['answered'] for p in pairs):.2%}",
        ])  # fmt: skip
    header = [
        "arm", "calls", "of them failed", "hosts killed", "waits for experts", "experts out of the gate's reach",
        "pairs dropped", "gradients lost",
    ]  # fmt: skip
    note = (
        "Of training, mean of the seeds. A call that got lost is repeated once, and then goes to another replica. Out "
        "of reach: without a replica that may be called, so that the gate chose among the rest. Dropped: pairs of a "
        "token and an expert that were chosen and not answered; the token's other experts took their weight. Lost: "
        "pairs whose gradient for the gate did not come back."
    )
    return f"{note}\n\n{markdown_table(header, rows)}"


def staleness_table(found: ArmResults) -> str:
    """How late gradients were, how far apart replicas."""
    rows = []
    for label in found.labels:
        results = found.results(label)
        rows.append([
            label,
            _of_swarm(results, lambda r: r["staleness_mean"], "{:.2f}"),
            _of_swarm(results, lambda r: r["staleness_max"], "{:.1f}"),
            _of_swarm(results, lambda r: r["exchanges"], "{:.0f}"),
            _of_swarm(results, lambda r: r["exchanged_bytes"] / MB, "{:.0f}"),
            _of_swarm(results, lambda r: r["divergence_mean"], "{:.1%}"),
            _of_swarm(results, lambda r: r["divergence_max"], "{:.1%}"),
        ])  # fmt: skip
    header = [
        "arm", "staleness, steps", "largest", "exchanges", "MB exchanged", "divergence of replicas", "largest",
    ]  # fmt: skip
    note = (
        "Mean of the seeds. Staleness: optimizer steps that a block took between the forward and the backward of one "
        "gradient. Divergence: relative L2 distance of two replicas' weights, as their hosts found it before each "
        "exchange."
    )
    return f"{note}\n\n{markdown_table(header, rows)}"


def cost_table(found: ArmResults, one: str) -> str:
    """Processor time, bytes, and the time that it took here."""
    rows = []
    layers = found.spec(one).layers
    base, base_rate = cpu_per_million(found, one), rate(found, one)
    for label in found.labels:
        results = found.results(label)
        trainer = fmean(result["cpu_seconds"] / result["tokens"] for result in results) * 1e6
        rows.append([
            label,
            f"{trainer:,.0f}",
            f"{cpu_per_million(found, label) - trainer:,.0f}",
            f"{cpu_per_million(found, label) / base:.2f}",
            _of_swarm(results, lambda r: r["wire_bytes"] / r["tokens"] / layers, "{:,.0f}"),
            f"{rate(found, label):,.0f}",
            f"{rate(found, label) / base_rate:.2f}",
        ])  # fmt: skip
    header = [
        "arm", "trainer, CPU seconds a million tokens", "all other processes", f"all, against {one}",
        "bytes on the wire per token and layer", "tokens/s", f"against {one}",
    ]  # fmt: skip
    note = (
        "Of training steps. Processor time counts every process of the trial, hosts that start again included. One "
        "process has one thread; a swarm has as many cores as the machine, which hosts and trainer share. "
        "Tokens/s were measured while the machine did other work, not always as much: what delays cost shows in them, "
        "small differences do not."
    )
    return f"{note}\n\n{markdown_table(header, rows)}"


def cpu_per_million(found: ArmResults, label: str) -> float:
    """CPU seconds of all processes for a million tokens, mean of the seeds."""
    results = found.results(label)
    return fmean((r["cpu_seconds"] + r["others_cpu_seconds"]) / r["tokens"] for r in results) * 1e6


def rate(found: ArmResults, label: str) -> float:
    """Tokens per second, mean of the seeds."""
    return fmean(result["tokens"] / result["seconds"] for result in found.results(label))


def _of_swarm(results: Sequence[Result], value: Callable[[Result], float], form: str) -> str:
    """The mean of the seeds, of arms that have hosts."""
    return form.format(fmean(map(value, results))) if "calls_ok" in results[0] else NOT_APPLICABLE


def differences(found: ArmResults, one: str) -> Figure:
    """A point for each arm, with its interval."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    labels = [label for label in reversed(found.labels) if label != one]
    gaps = [found.difference(label, one) for label in labels]
    axes.errorbar(
        [gap.mean for gap in gaps], labels, xerr=[gap.half_width for gap in gaps], fmt="o", capsize=4, color="C0"
    )
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.axvline(CLOSE, color="grey", linestyle=":")
    axes.set_xlabel(f"{LOSS}, less that of {one}")
    axes.grid(axis="x", alpha=0.3)
    return figure


def by_tokens(found: ArmResults) -> Figure:
    """A curve for each arm."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for label in found.labels:
        curves = [np.array(result["train"]) for result in found.results(label)]
        tokens_X, nats_X = np.mean([curve[:, 0] for curve in curves], 0), np.mean([curve[:, 1] for curve in curves], 0)
        axes.plot(tokens_X, nats_X, marker=".", label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("training nats per byte")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure

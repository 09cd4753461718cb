"""What the adapters experiment's results say: a sentence that they decide, tables, a drawing."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from experiments.adapters.domains import DOMAINS, WEAK
from experiments.adapters.volunteer import Volunteer
from experiments.arms.report import load_table_of
from experiments.harness.experiment import Report, markdown_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.adapters.arms import AdapterArm, AdapterResults
    from experiments.adapters.domains import DomainName
    from experiments.harness.experiment import Result

WIDE, HIGH = 9.0, 4.2
UNIT = "nats per token"
ENGLISH: tuple[DomainName, ...] = ("english",)
RUN_TOKENS = 1000
"""Tokens of a run for which a volunteer's traffic is told."""


def adapters_report(found: AdapterResults) -> Report:
    """All of it."""
    tables = {
        "Loss where the seed is weak": loss_table(found),
        "What is forgotten": english_table(found),
        "What a volunteer gives": volunteer_table(found),
        **hosted_tables(found),
        "Load": load_table(found),
        "Specialisation": specialisation_table(found),
        "Where Arrow sends tokens": arrow_table(found),
    }
    caption = "Held-out nats per token less than the seed alone has, by domain; 95 % intervals over seeds"
    return Report(finding=finding(found), tables=tables, figures={"domains": (caption, drawing(found))})


def finding(found: AdapterResults) -> str:
    """Adapters whose gate is trained with them, where the seed is weak and on English; then those trained apart."""
    alone, control = _arm(found, "alone"), _control(found)
    best = min(_gated(found), key=lambda arm: found.nats(arm, WEAK).mean)
    gain, learnt = found.difference(best, control, WEAK), found.difference(best, alone, WEAK)
    forgotten = found.difference(best, alone, ENGLISH)
    joint = (
        f"{best.label} are {gain.words_in(UNIT)} than one adapter of equal active size, and {learnt.words_in(UNIT)} "
        f"than the seed alone, where it is weak; on English they are {forgotten.words_in(UNIT)} than the seed alone"
    )
    return f"{joint}; {hosted_words(found)}{apart_words(found)}."


def hosted_words(found: AdapterResults) -> str:
    """What it changes that adapters are held by hosts."""
    words = ""
    for arm, here in _hosted(found).items():
        gap = found.difference(arm, here, WEAK)
        words += f"{here.label} that are held by {arm.hosts} hosts are {gap.words_in(UNIT)} than in one process; "
    return words


def apart_words(found: AdapterResults) -> str:
    """How much of what adapters learn apart is left when they are put together without training."""
    alone, own = _arm(found, "alone"), _arm(found, "own")
    learnt = found.difference(own, alone, WEAK).mean
    if learnt >= 0:
        return "adapters that were trained apart learnt nothing"
    ways = [arm for arm in found.arms.arms if arm.way in {"arrow-1", "arrow-all", "merged"}]
    kept = {arm.label: found.difference(arm, alone, WEAK).mean / learnt for arm in ways}
    words = ", ".join(f"{share:.0%} ({label.removeprefix('trained apart, ')})" for label, share in kept.items())
    return f"of what adapters learn apart, used each on its own domain, is left without further training: {words}"


def loss_table(found: AdapterResults) -> str:
    """Mean of the three domains, the paired difference from one adapter for all, and each domain."""
    control = _control(found)
    rows = []
    for arm in found.arms.arms:
        gap = "" if arm == control else str(found.difference(arm, control, WEAK))
        by_domain = [str(found.nats(arm, [name])) for name in WEAK]
        rate = f"{found.rates[arm.label]:g}" if arm.grid else "-"
        seeds = str(len(found.rows(arm))) if arm.grid else "-"
        rows.append([arm.label, rate, seeds, str(arm.active_rank), str(found.nats(arm, WEAK)), gap, *by_domain])
    header = ["arm", "rate", "seeds", "rank for a token", f"{UNIT}, mean of three", f"difference from {control.label}"]
    vocabulary = found.rows(_arm(found, "alone"))[0]["vocabulary"]
    note = (
        f"Held-out text, over the {vocabulary:,} tokens that occur. Half widths of 95 % intervals over seeds; for a "
        "difference with one seed, over windows."
    )
    return f"{note}{edge_words(found)}\n\n{markdown_table([*header, *WEAK], rows)}"


def edge_words(found: AdapterResults) -> str:
    """Which arms might learn better at a rate that was not tried."""
    rates = sorted(found.arms.rates)
    labels = [label for label, rate in found.rates.items() if rate in (rates[:1] + rates[-1:])]
    return f" Best at an end of the rates that were tried, so perhaps not tuned: {'; '.join(labels)}." if labels else ""


def english_table(found: AdapterResults) -> str:
    """English, which no adapter learnt from."""
    alone = _arm(found, "alone")
    rows = []
    for arm in found.arms.arms:
        if arm.way != "own":
            gap = "" if arm == alone else str(found.difference(arm, alone, ENGLISH))
            rows.append([arm.label, str(found.nats(arm, ENGLISH)), gap])
    note = (
        "English text, which no adapter learns from: above 0, some of it was forgotten. Who gives each domain its own "
        "adapter gives English none."
    )
    return f"{note}\n\n{markdown_table(['arm', f'English, {UNIT}', f'difference from {alone.label}'], rows)}"


def volunteer_table(found: AdapterResults) -> str:
    """Memory and bandwidth for one adapter of one layer."""
    rows = []
    for arm in (_control(found), *_gated(found), _arm(found, "own")):
        own, layers = Volunteer(**found.rows(arm)[0]["volunteer"]), found.arms.text.layers
        in_all = layers * (arm.grid.experts if arm.grid else 0) * (len(WEAK) if arm.is_apart else 1)
        per_token = own.wire_bytes_per_token
        wire = [f"{per_token:,.0f}", f"{per_token * own.share * RUN_TOKENS / 1000:,.0f}"]
        rows.append(
            [
                arm.label,
                f"{in_all:,}",
                f"{own.parameters:,}",
                f"{own.memory_bytes / 1000:,.1f}",
                f"{own.memory_bytes * own.block_adapters / 1000:,.0f}",
                *(["-", "-"] if arm.is_apart else wire),
            ]
        )
    header = [
        "arm", "adapters in all", "parameters of one", "weights and moments of one, KB", "of a block, KB",
        "bytes for a token that comes", f"KB for {RUN_TOKENS:,} tokens of the run, on average",
    ]  # fmt: skip
    note = (
        "By the product's own blocks and messages: float32 weights, two moments and counters; forward and backward, "
        "both ways, int8, one adapter for the token. The seed itself only trainers hold. Adapters that are trained "
        "apart need nobody else."
    )
    return f"{note}\n\n{markdown_table(header, rows)}"


def hosted_tables(found: AdapterResults) -> dict[str, str]:
    """Loss, bytes and processor time of adapters that hosts hold, beside the same ones in one process."""
    rows = []
    for arm, here in _hosted(found).items():
        ours, theirs = found.rows(arm), found.rows(here)
        layers, tokens = found.arms.text.layers, ours[0]["tokens"]

        def mean(rows: Sequence[Result], *keys: str) -> float:
            return fmean(sum(row[key] for key in keys) for row in rows)

        rows.append(
            [
                arm.label,
                f"{layers * (arm.grid.experts if arm.grid else 0):,}",
                str(found.difference(arm, here, WEAK)),
                f"{mean(ours, 'calls_ok'):,.0f}",
                f"{mean(ours, 'calls_failed'):,.0f}",
                f"{mean(ours, 'wire_bytes') / tokens / layers:,.0f}",
                f"{mean(ours, 'cpu_seconds', 'others_cpu_seconds') / mean(theirs, 'cpu_seconds'):.2f}",
            ]
        )
    header = [
        "arm", "adapters in all", f"{UNIT}, difference from one process", "calls", "of them failed",
        "bytes for a token and layer", "processor time, times that of one process",
    ]  # fmt: skip
    note = "Of training, mean of the seeds. Bytes are counted on the messages of all hosts, both ways."
    return {"Held by hosts": f"{note}\n\n{markdown_table(header, rows)}"} if rows else {}


def load_table(found: AdapterResults) -> str:
    """How evenly trained gates use their adapters."""
    return load_table_of({arm.label: [g for row in found.rows(arm) for g in row["gates"]] for arm in _gated(found)})


def specialisation_table(found: AdapterResults) -> str:
    """Mutual information of adapters and domain, beside that with shuffled windows."""
    rows = []
    for arm in (*_gated(found), _arm(found, "arrow-1")):
        layers = [layer for row in found.rows(arm) for layer in row["specialisation"][arm.way]]
        bits, null = (fmean(layer[key] for layer in layers) for key in ("bits", "shuffled_bits"))
        spread = max(layer["shuffled_std"] for layer in layers)
        rows.append([arm.label, f"{bits:.3f}", f"{null:.3f} ± {spread:.3f}", f"{np.log2(len(DOMAINS)):.2f}"])
    note = (
        "Mutual information between a token's adapters and the domain of its text, English too, on held-out text, mean "
        "over layers and seeds; beside it the same with windows shuffled, and what a perfect choice could tell."
    )
    return f"{note}\n\n{markdown_table(['arm', 'domain, bits', 'shuffled', 'most'], rows)}"


def arrow_table(found: AdapterResults) -> str:
    """Share of each domain's tokens that goes to each adapter, where Arrow chooses one; and in tuning, by rate."""
    arrow = _arm(found, "arrow-1")
    shares = [row["shares"]["arrow-1"] for row in found.rows(arrow)]
    rows = [[name, *(f"{part:.0%}" for part in np.mean([own[name] for own in shares], 0))] for name in DOMAINS]
    table = markdown_table(["tokens of", *(f"to the adapter for {name}" for name in WEAK)], rows)
    note = "Where it chooses one; mean over layers and seeds."
    tuned = [
        [f"{rate:g}", *(f"{row['shares']['arrow-1'][name][index]:.0%}" for index, name in enumerate(WEAK))]
        for rate, row in found.tuning(arrow).items()
    ]
    if not tuned:
        return f"{note}\n\n{table}"
    words = (
        "Prototypes depend on how far adapters have moved. Share that went to the adapter of a token's own domain in "
        "the runs that tuned the rate, of which the one with the lowest loss was taken:"
    )
    by_rate = markdown_table(["rate", *(f"{name} to its own" for name in WEAK)], tuned)
    return f"{note}\n\n{table}\n\n{words}\n\n{by_rate}"


def drawing(found: AdapterResults) -> Figure:
    """A group of bars for each domain, English too."""
    figure = Figure(figsize=(WIDE, HIGH), layout="constrained")
    axes = figure.subplots()
    alone, arms = _arm(found, "alone"), found.arms.trained
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        domains = [name for name in DOMAINS if arm.way != "own" or name in WEAK]
        gains = [found.difference(arm, alone, [name]) for name in domains]
        places = np.array([DOMAINS.index(name) for name in domains]) + (index - (len(arms) - 1) / 2) * width
        errors = [gain.half_width for gain in gains]
        axes.bar(places, [-gain.mean for gain in gains], width, yerr=errors, capsize=2, label=arm.label)
    axes.set_xticks(range(len(DOMAINS)), DOMAINS)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_ylabel(f"{UNIT} less than the seed alone")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    return figure


def _arm(found: AdapterResults, way: str) -> AdapterArm:
    return next(arm for arm in found.arms.arms if arm.way == way)


def _control(found: AdapterResults) -> AdapterArm:
    """The one adapter that all domains share."""
    return next(arm for arm in found.arms.arms if arm.way == "gated" and arm.grid and arm.grid.experts == 1)


def _hosted(found: AdapterResults) -> dict[AdapterArm, AdapterArm]:
    """Arms that hosts hold, each with the same one in one process."""
    arms = found.arms.arms
    here = {(arm.way, arm.grid): arm for arm in arms if not arm.hosts}
    return {arm: here[arm.way, arm.grid] for arm in arms if arm.hosts}


def _gated(found: AdapterResults) -> Sequence[AdapterArm]:
    """Arms with a choice that was trained."""
    return [arm for arm in found.arms.arms if arm.way == "gated" and arm.grid and arm.grid.experts > 1]

"""Claim 1: instead of 8 experts, why not 1,000? Loss by the number of experts, at equal active width and tokens."""

from __future__ import annotations

from experiments.arms.arm import Arm
from experiments.arms.arms import ArmResults, Arms, ArmsExperiment
from experiments.arms.report import arms_figures, arms_tables, saturation
from experiments.arms.tuning import RATES
from experiments.harness.experiment import Report

DENSE = Arm(label="dense, equal active width", hidden=256)
DENSE_FLOPS = Arm(label="dense, equal FLOPs", hidden=384)
"""It takes at least as many FLOPs as the costliest arm with experts, its gate counted."""

DENSE_TOTAL = Arm(label="dense, as large as 64 experts", hidden=2048)
EXPERTS = (
    Arm(label="2 of 8 experts", hidden=128, experts=8, per_token=2),
    Arm(label="8 of 64 experts", hidden=32, experts=64, per_token=8),
    Arm(label="8 of 529 experts", hidden=32, experts=529, per_token=8, gate="product_key"),
    Arm(label="8 of 2,025 experts", hidden=32, experts=2025, per_token=8, gate="product_key"),
    Arm(label="8 of 8,281 experts", hidden=32, experts=8281, per_token=8, gate="product_key"),
)
FULL = Arms(
    arms=(DENSE, DENSE_FLOPS, *EXPERTS, DENSE_TOTAL),
    tokens=4_096_000,
    seeds=3,
    rates=(*RATES, 1.6e-2),
    tuning_tokens=512_000,
)
QUICK = Arms(arms=(DENSE, DENSE_FLOPS, *EXPERTS[:4]), tokens=1_024_000, seeds=1)

EXPECTED = 0.10
MANY = 512


METHOD = f"""
A byte-level transformer of 3 layers (D=128, 4 heads, 128 bytes of context) learns English Wikipedia summaries, each
byte at most once: {FULL.tokens:,} tokens, 2,048 a step, Adam, warm-up over 3 % of them, then a cosine to a tenth. Only
the feed-forward layers differ. In every arm with experts 256 hidden units work for a token, however many experts there
are to choose from: 2 experts of 128 out of 8, or 8 experts of 32 out of 64 to 8,281. From 529 experts on the gate has
product keys, which take a square number of experts. A bias balances the load; no token is dropped.

Controls: a dense layer of the same active width; one of {DENSE_FLOPS.hidden} hidden units, which costs at least as many
FLOPs as any arm with experts, its gate counted; and, as the upper bound for 64 experts, a dense layer as large as all
of them together. The learning rate is tuned for each arm alike, on {FULL.tuning_tokens:,} tokens with a seed of its
own: {", ".join(f"{rate:g}" for rate in FULL.rates)} are tried. Held-out text is the same for all arms and
their {FULL.seeds} seeds; a difference is taken seed by seed and window by window. Intervals are of 95 %.

What this cannot show: what happens with larger models, or with much more text. An arm with more experts has more
parameters, as it has on a swarm: equal are the work for each token and the tokens, not the memory.
"""


def report(found: ArmResults) -> Report:
    """Tables, plots, and whether 1,000 are worth more than 8."""
    tables = arms_tables(found, against=DENSE_FLOPS.label)
    return Report(finding=finding(found), tables=tables, figures=arms_figures(found))


def finding(found: ArmResults) -> str:
    """Say in a sentence or two what the results decide."""
    dense = DENSE_FLOPS.label
    many = [label for label in found.labels if found.spec(label).arm.experts >= MANY]
    best = min(many, key=found.mean)
    gain, eight = found.difference(best, dense), found.difference(best, EXPERTS[0].label)
    expected = "as expected" if -gain.mean >= EXPECTED else f"less than the {EXPECTED:.2f} that was expected"
    verdict = (
        f"{best} are {gain.words} than a dense model of equal FLOPs ({expected}), and {eight.words} than 2 of 8, "
        f"after {found.spec(best).tokens:,} tokens"
    )
    return f"{verdict}; {saturation(found, EXPERTS[1:])}."


EXPERIMENT = ArmsExperiment(
    name="granularity",
    claim='"Instead of 8 experts, why not 1,000? That is easy to parallelise."',
    method=METHOD,
    presets={"quick": QUICK, "full": FULL},
    report_of=report,
)

"""Claim 2: experts so small are a "Mixture of Idiots". Loss by an expert's size, at equal total and active size."""

from __future__ import annotations

from experiments.arms.arm import Arm
from experiments.arms.arms import ArmResults, Arms, ArmsExperiment
from experiments.arms.report import arms_tables, by_progress, by_size
from experiments.harness.experiment import Report

DENSE = Arm(label="dense, equal active width", hidden=128)
LARGE = Arm(label="1 of 128 experts, H=128", hidden=128, experts=128, per_token=1)
MIDDLE = Arm(label="4 of 529 experts, H=32", hidden=32, experts=529, per_token=4, gate="product_key")
SMALL = Arm(label="16 of 2,025 experts, H=8", hidden=8, experts=2025, per_token=16, gate="product_key")
NEURONS = Arm(label="128 of 16,384 experts, H=1", hidden=1, experts=16_384, per_token=128, gate="product_key")
HASHED = Arm(label="4 of 529 by hash, H=32", hidden=32, experts=529, per_token=4, gate="hash")
FROZEN = Arm(
    label="4 of 529 by a frozen gate, H=32", hidden=32, experts=529, per_token=4, gate="product_key", frozen_gate=True
)
SIZES = (LARGE, MIDDLE, SMALL, NEURONS)
NULLS = (HASHED, FROZEN)
# The highest of the usual rates was the best for most arms of `granularity`.
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
FULL = Arms(arms=(DENSE, *SIZES, *NULLS), tokens=1_024_000, seeds=3, tuning_tokens=256_000, rates=RATES)
QUICK = Arms(arms=(DENSE, *SIZES, *NULLS), tokens=256_000, seeds=1)


METHOD = f"""
The model, text and training of [granularity](granularity.md), on {FULL.tokens:,} tokens. In every arm with experts 128
hidden units work for a token, out of about 16,400 (15,900 to 17,000, as product keys take a square number of experts);
what differs is in how small pieces they can be chosen: experts of 128, 32, 8 and 1 hidden unit. Those of one are the
single neurons of PEER (arXiv 2407.04153).

Nulls, at 32 hidden units: experts chosen by a gate that stays as it was drawn, and by a fixed hash of the last two
bytes (arXiv 2106.04426). If a learnt gate is no better than the first, what it learns to choose does not matter. The
second is more than a null where a token is a byte: it tells the experts which two bytes came last, in every layer, and
what follows two bytes can be learnt by heart.

The learning rate is tuned for each arm alike, on {FULL.tuning_tokens:,} tokens with a seed of its own, out of
{", ".join(f"{rate:g}" for rate in RATES)}. Intervals are of 95 %.

What this cannot show: equal is the work of the experts, not of the gate, whose share grows as experts shrink; and the
grouped product gives small experts more tokens per second on a GPU than on the processor that was used here, or fewer.
"""


def report(found: ArmResults) -> Report:
    """Tables, plots, and whether the smallest are idiots."""
    figures = {
        "size": ("Held-out loss by the hidden width of an expert; nulls as lines across", by_size(found, NULLS)),
        "tokens": ("Held-out loss by tokens, mean of the seeds", by_progress(found, "tokens", lambda _: 1.0)),
    }
    return Report(finding=finding(found), tables=arms_tables(found, against=LARGE.label), figures=figures)


def finding(found: ArmResults) -> str:
    """Say in a sentence or two what the results decide."""
    ladder = [arm.label for arm in SIZES if arm.label in found.labels]
    best = min(ladder, key=found.mean)
    smallest = found.difference(ladder[-1], LARGE.label)
    fewer = len(found.results(ladder[-1])) < len(found.results(LARGE.label))
    verdict = (
        f"{ladder[-1]}: {smallest.words} than {LARGE.label} at equal active and total size"
        f"{' (fewer seeds than the others so far)' if fewer else ''}; "
        f"the best size was {best} ({found.mean(best):.3f} nats per byte), {found.difference(best, DENSE.label).words} "
        f"than a dense layer of equal active width"
    )
    frozen, hashed = (found.difference(MIDDLE.label, null.label) for null in (FROZEN, HASHED))
    return f"{verdict}; a learnt gate is {frozen.words} than a frozen one, and {hashed.words} than a hash of two bytes."


EXPERIMENT = ArmsExperiment(
    name="idiots",
    claim='"Experts so small would be a Mixture of Idiots."',
    method=METHOD,
    presets={"quick": QUICK, "full": FULL},
    report_of=report,
)

"""Claim 1 again, with the gate of new runs: how many experts pay, and against which nulls, at equal active width."""

from __future__ import annotations

from dataclasses import replace

from experiments.arms.arm import N_TABLES, Arm
from experiments.arms.arms import ArmResults, Arms, ArmsExperiment
from experiments.arms.choosing import LEARNT_8, PRODUCT, SMEARED
from experiments.arms.report import arms_figures, arms_tables, saturation
from experiments.harness.experiment import Report

DENSE = Arm(label="dense, equal active width", hidden=256, recipe=SMEARED)
DENSE_FLOPS = replace(DENSE, label="dense, equal FLOPs", hidden=448)
"""It takes at least as many FLOPs as the costliest arm with experts, its gate counted."""

DENSE_TOTAL = replace(DENSE, label="dense, as large as 64 experts", hidden=2048)
TABLES = replace(DENSE, label="dense, and tables of as many parameters as 2,025 experts", tables=48_600)
LADDER = (
    replace(PRODUCT, label="8 of 64 experts", experts=64),
    replace(PRODUCT, label="8 of 529 experts", experts=529),
    replace(PRODUCT, label="8 of 2,025 experts"),
    replace(PRODUCT, label="8 of 8,281 experts", experts=8281),
)
MANY = LADDER[2]
NEURONS = replace(PRODUCT, label="256 of 16,384 experts, H=1", hidden=1, experts=16_384, per_token=256)
LEARNT_MANY = replace(LEARNT_8, label="8 of 2,025 experts, learnt gate")
FROZEN_MANY = replace(LEARNT_MANY, label="8 of 2,025 experts, frozen gate", frozen_gate=True)
LEARNT_529 = replace(LEARNT_MANY, label="8 of 529 experts, learnt gate", experts=529)
FROZEN_529 = replace(FROZEN_MANY, label="8 of 529 experts, frozen gate", experts=529)
ARMS = (
    DENSE_FLOPS, MANY, LEARNT_MANY, FROZEN_MANY, TABLES, LADDER[0], LADDER[1], LADDER[3], DENSE, DENSE_TOTAL,
    LEARNT_529, FROZEN_529, NEURONS,
)  # fmt: skip
"""Those that decide come first."""

RATES = (4e-3, 8e-3)
FULL = Arms(arms=ARMS, tokens=4_096_000, seeds=3, tuning_tokens=256_000, rates=RATES)
QUICK = Arms(arms=(DENSE_FLOPS, *LADDER[:3], LEARNT_MANY), tokens=102_400, seeds=1)


METHOD = f"""
The model and recipe of [choosing](choosing.md) on {FULL.tokens:,} tokens of English Wikipedia summaries, each byte at
most once, 2,048 a step. In every arm each of the two bytes before a token is added to the trunk's input, and in every
arm with experts 256 hidden units work for a token, however many there are to choose from. Experts are chosen as in new
runs: one by a hash of the last byte, one by that of the last two, and so on up to eight.

Controls: a dense layer of the same active width; one of {DENSE_FLOPS.hidden} hidden units, which costs at least as many
FLOPs as any other arm but the next; one as large as 64 experts together; and a dense layer of the same active width
beside {N_TABLES} tables of {TABLES.tables:,} rows, by the last one to eight bytes, which are added to the input of the
trunk: as many parameters as 2,025 experts have, and knowledge of the same bytes, without experts. Against the hash
stands a gate that learns to choose by codes of the same bytes, with product keys and a balanced load, and its null,
whose keys are never learnt. Single neurons are those of PEER (arXiv 2407.04153).

The learning rate is tuned for each arm alike, on {FULL.tuning_tokens:,} tokens with a seed of its own, out of
{" and ".join(f"{rate:g}" for rate in RATES)}. Held-out text is the same for all arms and their {FULL.seeds} seeds; a
difference is taken seed by seed and window by window. Intervals are of 95 %.

What this cannot show: what happens with larger models, with tokens of more than a byte, or with much more text. An arm
with more experts has more parameters, as it has on a swarm: equal are the work for each token and the tokens, not the
memory.
"""


def report(found: ArmResults) -> Report:
    """Tables, plots, and whether thousands are worth more than dozens and than dense."""
    tables = arms_tables(found, against=DENSE_FLOPS.label)
    return Report(finding=finding(found), tables=tables, figures=arms_figures(found))


def finding(found: ArmResults) -> str:
    """Say in a sentence or two what the results decide."""
    gain = found.difference(MANY.label, DENSE_FLOPS.label).words
    against = "; ".join(found.compared(MANY.label, (TABLES, LEARNT_MANY, FROZEN_MANY)))
    tokens = found.spec(MANY.label).tokens
    verdict = f"{MANY.label} are {gain} than a dense model of equal FLOPs after {tokens:,} tokens; {against}"
    return f"{verdict}; {saturation(found, LADDER)}."


EXPERIMENT = ArmsExperiment(
    name="thousands",
    claim='"Instead of 8 experts, why not 1,000?", with the gate of new runs.',
    method=METHOD,
    presets={"quick": QUICK, "full": FULL},
    report_of=report,
)

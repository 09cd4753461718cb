"""Claim 1, on four times the tokens: the arms that decide whether thousands of experts pay, over a text read once."""

from __future__ import annotations

from dataclasses import replace

from experiments.arms.arm import Arm
from experiments.arms.arms import ArmResults, Arms, ArmsExperiment
from experiments.arms.choosing import LEARNT_8, PRODUCT, SMEARED
from experiments.arms.report import arms_figures, arms_tables
from experiments.harness.experiment import Report

DENSE = Arm(label="dense, equal FLOPs", hidden=448, recipe=SMEARED)
MANY = replace(PRODUCT, label="8 of 2,025 experts")
FEWER = replace(MANY, label="8 of 529 experts", experts=529)
MOST = replace(MANY, label="8 of 8,281 experts", experts=8281)
LEARNT_MANY = replace(LEARNT_8, label="8 of 2,025 experts, learnt gate")
FROZEN_MANY = replace(LEARNT_MANY, label="8 of 2,025 experts, frozen gate", frozen_gate=True)
ARMS = (DENSE, MANY, LEARNT_MANY, MOST, FEWER, FROZEN_MANY)
RATES = (4e-3, 8e-3)
FULL = Arms(arms=ARMS, tokens=16_384_000, seeds=3, tuning_tokens=512_000, rates=RATES, text="long")
QUICK = Arms(arms=(DENSE, MANY, LEARNT_MANY), tokens=102_400, seeds=1, text="long")
WANTED = 0.10
"""Nats per byte that many experts are to be better than a dense model of equal FLOPs."""


METHOD = f"""
The model of [choosing](choosing.md), and its recipe in every arm, on {FULL.tokens:,} tokens of a text that is read
once: about 46 MB, of which 11 MB are summaries of Wikipedia articles in English, French and Spanish, and the rest the
Python sources of matplotlib, numpy and scipy in the versions of the lock file. Whole articles and whole files are held
out. Tokens are bytes; 2,048 make a step.

The arms are those that decide: a dense model that costs at least as many FLOPs as any other; 8 of 529, 2,025 and 8,281
experts of 32 hidden units, chosen as in new runs by a hash of the last one to eight bytes; and for 2,025 experts a gate
that learns to choose by codes of the same bytes, and its null, whose keys are never learnt. The learning rate is tuned
for each arm alike, on {FULL.tuning_tokens:,} tokens with a seed of its own, out of
{" and ".join(f"{rate:g}" for rate in RATES)}. Intervals are of 95 %.

What this cannot show: what larger models would do, or tokens of more than a byte. Most of the text is Python.
"""


def report(found: ArmResults) -> Report:
    """Tables, plots, and whether thousands of experts pay."""
    tables = arms_tables(found, against=DENSE.label)
    return Report(finding=finding(found), tables=tables, figures=arms_figures(found))


def finding(found: ArmResults) -> str:
    """Say in a sentence or two what the results decide."""
    gain = found.difference(MANY.label, DENSE.label)
    words = "as wanted" if -gain.mean >= WANTED else f"less than the {WANTED:.2f} that was wanted"
    against = "; ".join(found.compared(MANY.label, ARMS[2:]))
    tokens = found.spec(MANY.label).tokens
    verdict = f"{MANY.label} are {gain.words} than a dense model of equal FLOPs ({words}) after {tokens:,} tokens"
    return f"{verdict}; {against}."


EXPERIMENT = ArmsExperiment(
    name="longer",
    claim='"Instead of 8 experts, why not 1,000?", with four times the tokens.',
    method=METHOD,
    presets={"quick": QUICK, "full": FULL},
    report_of=report,
)

"""Claim 1, the gate's part: it must be trained with the experts. Loss by how a token's experts are chosen."""

from __future__ import annotations

from dataclasses import replace

from experiments.arms.arm import Arm, Recipe
from experiments.arms.arms import ArmResults, Arms, ArmsExperiment
from experiments.arms.life_report import life_figures
from experiments.arms.report import arms_tables, by_progress
from experiments.harness.experiment import Report

SMEARED = Recipe(smear=2)
CODES = Recipe(
    smear=2,
    gate_reads="tokens",
    gate_heads=4,
    gate_score="softmax",
    gate_lr_fraction=0.04,
    balance="proportional",
    balance_rate=5e-4,
)
"""Gates that learn to choose by codes."""

HASH = Recipe(smear=2, gate_reads="tokens", gate_heads=8, gate_shortest=1, gate_score="softmax")
"""What new runs take, with eight experts for a token."""

DENSE = Arm(label="dense, equal FLOPs", hidden=384, recipe=SMEARED)
FIRST = Arm(label="learnt, by hidden states", hidden=32, experts=2025, per_token=8, gate="product_key", recipe=SMEARED)
LEARNT = replace(FIRST, label="learnt, by codes of 2 to 5 bytes", recipe=CODES)
FROZEN = replace(LEARNT, label="frozen, by codes of 2 to 5 bytes", frozen_gate=True)
HASHED = replace(FIRST, label="hash of 2 bytes", gate="hash")
HASHED_5 = replace(HASHED, label="hash of 2 to 5 bytes", recipe=replace(SMEARED, gate_heads=4))
PRODUCT = replace(FIRST, label="hash of 1 to 8 bytes", gate="hash", recipe=HASH)
LEARNT_8 = replace(
    LEARNT, label="learnt, by codes of 1 to 8 bytes", recipe=replace(CODES, gate_heads=8, gate_shortest=1)
)
NULLS = (FROZEN, HASHED, HASHED_5)
ARMS = (DENSE, FIRST, LEARNT, *NULLS, PRODUCT, LEARNT_8)
RATES = (4e-3, 8e-3)
FULL = Arms(arms=ARMS, tokens=1_024_000, seeds=3, tuning_tokens=256_000, rates=RATES)
QUICK = Arms(arms=ARMS, tokens=102_400, seeds=1)


METHOD = f"""
The model and text of [granularity](granularity.md), on {FULL.tokens:,} tokens; in every arm each of the two bytes
before a token is added to the trunk's input, times a vector that is learnt. All arms but the dense one have 2,025
experts of 32 hidden units in each layer, 8 of which work for a token. What differs is how these are chosen:

- by product keys from the layer's input, as the first runs did: what the trunk makes of a token moves while it learns,
  and with it which experts the token meets;
- by product keys from fixed random codes of the last bytes, two experts by the last two bytes, two by the last three,
  and so on up to five. The keys are learnt, at a twenty-fifth of the trunk's rate;
- nulls: the same with keys that stay as they were drawn; and a fixed hash of the same bytes, or of two, whose experts
  weigh alike;
- one expert by the last byte, one by the last two, and so on up to eight: by a fixed hash, which is what new runs do,
  and by learnt keys.

The learning rate is tuned for each arm alike, on {FULL.tuning_tokens:,} tokens with a seed of its own, out of
{" and ".join(f"{rate:g}" for rate in RATES)}. Intervals are of 95 %.

What this cannot show: what a gate that chooses by meaning would be worth where a token is more than a byte, or after
many more tokens. Codes of several bytes are knowledge that a dense layer does not have.
"""


def report(found: ArmResults) -> Report:
    """Tables, a plot, and whether what the gate learns matters."""
    figures = {"tokens": ("Held-out loss by tokens, mean of the seeds", by_progress(found, "tokens", lambda _: 1.0))}
    figures |= life_figures(found)
    return Report(finding=finding(found), tables=arms_tables(found, against=DENSE.label), figures=figures)


def finding(found: ArmResults) -> str:
    """Say in a sentence or two what the results decide."""
    gains = found.compared(PRODUCT.label, (DENSE, FIRST))
    learning = found.difference(LEARNT_8.label, PRODUCT.label).words
    others = "; ".join(f"{LEARNT.label}: {words}" for words in found.compared(LEARNT.label, (FROZEN, HASHED_5, HASHED)))
    return (
        f"Experts that a {PRODUCT.label} chooses are {' and '.join(gains)}. A gate that learns to choose by codes of "
        f"the same bytes is {learning} than the hash; {others}."
    )


EXPERIMENT = ArmsExperiment(
    name="choosing",
    claim='"The gate must be trained with the experts."',
    method=METHOD,
    presets={"quick": QUICK, "full": FULL},
    report_of=report,
)

"""Do tiny experts pay where a token is more than a byte, and which recipe chooses them best there?"""

from __future__ import annotations

import math
from dataclasses import replace

from experiments.arms.arm import Arm, Recipe
from experiments.arms.arms import ArmResults, Arms, ArmsExperiment
from experiments.arms.choosing import HASH, LEARNT_8, PRODUCT, SMEARED
from experiments.arms.report import by_progress, cost_table
from experiments.harness.experiment import Report, markdown_table

LN_2 = math.log(2)
VOCABULARY = 4096
BYTES_PER_TOKEN = 3
"""About as many bytes as a token of that vocabulary stands for: arms in bytes read as much text, in more tokens."""

DENSE = Arm(label="dense", hidden=384, recipe=SMEARED, vocabulary=VOCABULARY)
DENSE_PLAIN = replace(DENSE, label="dense, nothing added", recipe=Recipe())
HASHED_8 = replace(PRODUCT, label="hash of 1 to 8 tokens", vocabulary=VOCABULARY)
HASHED_4 = replace(HASHED_8, label="hash of 1 to 4 tokens", recipe=replace(HASH, gate_heads=4))
HASHED_2 = replace(HASHED_8, label="hash of 1 to 2 tokens", recipe=replace(HASH, gate_heads=2))
HASHED_1 = replace(HASHED_8, label="hash of 1 token", recipe=replace(HASH, gate_heads=1))
LEARNT_4 = replace(
    LEARNT_8,
    label="learnt, by codes of 1 to 4 tokens",
    recipe=replace(LEARNT_8.recipe, gate_heads=4),
    vocabulary=VOCABULARY,
)
HIDDEN = replace(LEARNT_8, label="learnt, by hidden states", recipe=SMEARED, vocabulary=VOCABULARY)
UNSMEARED = replace(HASHED_4, label="hash of 1 to 4 tokens, nothing added", recipe=replace(HASHED_4.recipe, smear=0))
IN_TOKENS = (DENSE, HASHED_4, HASHED_8, HASHED_2, HASHED_1, LEARNT_4, HIDDEN, DENSE_PLAIN, UNSMEARED)
DENSE_BYTES = replace(DENSE, label="dense, in bytes", vocabulary=0)
HASHED_BYTES = replace(PRODUCT, label="hash of 1 to 8 bytes")
IN_BYTES = (HASHED_BYTES, DENSE_BYTES)
RATES = (4e-3, 8e-3)
TOKENS = 2_048_000
FULL = Arms(
    arms=(*IN_TOKENS, *IN_BYTES),
    tokens=TOKENS,
    seeds=2,
    tuning_tokens=256_000,
    rates=RATES,
    text="long",
    tokens_of={arm.label: TOKENS * BYTES_PER_TOKEN for arm in IN_BYTES},
)
QUICK = Arms(
    arms=(DENSE, HASHED_4, HASHED_BYTES),
    tokens=51_200,
    seeds=1,
    tokens_of={HASHED_BYTES.label: 51_200 * BYTES_PER_TOKEN},
)


METHOD = f"""
The model of [choosing](choosing.md) on the text of `longer`, which is cut into the {VOCABULARY:,} tokens of
a tokenizer of its own (byte-level pairs, trained on its training part), about {BYTES_PER_TOKEN} bytes each:
{TOKENS:,} tokens, and {BYTES_PER_TOKEN} times as many where each byte is one. Losses are per byte in all arms, so that
they compare; windows are of 128 tokens, so that an arm in bytes sees less text before each.

All arms but the dense ones have 2,025 experts of 32 hidden units in each layer, 8 of which work for a token. The table
and the head of a vocabulary of {VOCABULARY:,} are most of the trunk. In all arms but two each of the two tokens before
a token is added to the trunk's input. The learning rate is tuned for each arm alike, on {FULL.tuning_tokens:,} tokens
with a seed of its own, out of {" and ".join(f"{rate:g}" for rate in RATES)}. Intervals are of 95 %; those of an arm
with one seed are over the windows of its held-out text alone.

What this cannot show: other vocabularies, larger models, and what many more tokens would do.
"""


def report(found: ArmResults) -> Report:
    """Losses per byte, costs, and which way to choose is best where tokens are more than bytes."""
    tables = {"Loss": loss_table(found), "What it costs": cost_table(found, DENSE.label)}
    curves = {"tokens": ("Held-out loss by tokens, mean of the seeds", by_progress(found, "tokens", lambda _: 1.0))}
    return Report(finding=finding(found), tables=tables, figures=curves)


def loss_table(found: ArmResults) -> str:
    """Held-out nats and bits per byte; differences are over the same windows, so among arms with the same tokens."""
    rows = []
    for label in found.labels:
        same = DENSE if found.spec(label).arm.vocabulary else DENSE_BYTES
        known = same.label in found.labels and same.label != label
        gap = str(found.difference(label, same.label)) if known else ""
        nats = found.nats(label)
        n_seeds = str(len(found.results(label)))
        rows.append([label, f"{found.spec(label).lr:g}", n_seeds, str(nats), f"{nats.mean / LN_2:.3f}", gap])
    header = [
        "arm",
        "rate",
        "seeds",
        "held-out nats per byte",
        "bits per byte",
        "difference from dense with the same tokens",
    ]
    return markdown_table(header, rows)


def finding(found: ArmResults) -> str:
    """Say in a sentence what the results decide."""
    with_experts = [arm for arm in IN_TOKENS if arm.experts and arm.label in found.labels]
    best = min(with_experts, key=lambda arm: found.mean(arm.label))
    gain = found.difference(best.label, DENSE.label).words
    words = f"Of tokens of a vocabulary of {VOCABULARY:,}, the best way to choose is {best.label}: {gain} than dense"
    in_bytes = [arm.label for arm in IN_BYTES if arm.label in found.labels]
    if in_bytes:
        best_bytes = min(in_bytes, key=found.mean)
        worse = found.mean(best_bytes) - found.mean(best.label)
        words += (
            f"; {best_bytes} is {abs(worse):.3f} nats per byte {'worse' if worse > 0 else 'better'} on as much text"
        )
    return f"{words}."


EXPERIMENT = ArmsExperiment(
    name="tokens",
    claim="Tiny experts need bytes: with a tokenizer, as every large model has one, they gain nothing.",
    method=METHOD,
    presets={"quick": QUICK, "full": FULL},
    report_of=report,
)

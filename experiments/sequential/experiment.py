"""Claim: whether a tiny change is better can be told without running the whole benchmark again.

A real model is trained; updates of one expert, good and bad, are put to the test of
`node.trainer.evaluator.sequential_test`, and what it says is held against their gain over the whole held-out text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.arms.arm import Arm, TrainSpec
from experiments.arms.text import open_text
from experiments.harness.experiment import Trial, no_results
from experiments.sequential.one_expert import OneExpert, expert_loads, reached_by, trained_model
from experiments.sequential.report import sequential_report
from experiments.sequential.updates import Update, Workshop, stops_by_peeking
from node.model.transformer import bits_per_byte
from node.trainer.evaluator.sequential_test import SequentialTestConfig, decide
from node.trainer.train_step import mean_nats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from experiments.arms.training import Model
    from experiments.harness.experiment import Preset, Report, Result, TrialContext
    from node.data import TextDataset

LOADS = (0.1, 0.5, 0.9)
"""Which experts are changed: their places among those of their layer, by the tokens that reach them."""
WORTH_OF_LAYER = 3e-3
"""Nats per byte that a layer would gain if each of its experts brought what is just worth having."""
SIZES: dict[str, tuple[int, ...]] = {"quick": (64, 512), "full": (64, 512)}
SEEDS = {"quick": 1, "full": 3}
TOKENS = {"quick": 1_500_000, "full": 6_000_000}
UPDATE_SEEDS = {"quick": 3, "full": 10}
RATE = 5e-3
BATCH, TEXT_BATCHES, LOAD_BATCHES = 64, 64, 8


class Sequential:
    """The experiment."""

    name = "sequential"
    claim = (
        "Whether a change to one tiny expert is better can be told from a part of the held-out text, without running "
        "the whole benchmark again, and with a bounded rate of error."
    )
    method = """\
A byte-level mixture-of-experts model is trained on the default corpus, in one process. Three experts of its last layer
are then changed, one at a time, the rest frozen: one that few tokens reach, one in the middle, one that many reach.
Changes are of five kinds: trained further on its own tokens of the training text (1 to 256 steps), and four that should
gain nothing: noise of the same size, the trained update backwards, training on shuffled bytes, and the trained update
stretched until its gain over the whole held-out text is just gone, which is the hardest case for a test against "no
gain". How an update was made decides nothing: its true gain is measured on the whole held-out text.

The test (`node/trainer/evaluator/sequential_test.py`) meets held-out windows in random order and stops when it knows:
*accept*, it gains more than nothing; *reject*, it gains less than is worth having (0.003 nats per byte, shared among
the layer's experts), or one window became far worse than any before. It is a betting confidence sequence for sampling
without replacement (arXiv 2010.09686), so an update that gains nothing is accepted with a probability of at most 5%,
whenever it is looked at. Rejecting for lack of worth would hide errors, so the test is run a second time with a worth
of 0: an update is then rejected for doing harm only, or at the end of the text. The control is what people do instead:
a t test at 5%, looked at after each window. At the end of the text its mean is known and everything is decided rightly,
so what the test is worth shows in what it knows after a quarter and a half.

What it cannot show: the truth is the held-out text's own mean, so nothing is said about other text; a text that decides
on many updates is fitted in the end; and an update that ruins a share of the windows so small that none is met goes
unseen. Only the last layer was changed, where a change alters its own tokens' predictions and no others."""

    def plan(self, preset: Preset, results: Mapping[str, Result]) -> Sequence[Trial]:  # noqa: ARG002 - no stages
        """One model per number of experts and seed."""
        cases = [(seed, size) for seed in range(SEEDS[preset]) for size in SIZES[preset]]
        return [
            Trial(
                name=f"{size}-experts-seed-{seed}",
                spec={"train": _spec(size, seed, TOKENS[preset]).to_json(), "update_seeds": UPDATE_SEEDS[preset]},
            )
            for seed, size in cases
        ]

    def run(self, spec: dict[str, Any], context: TrialContext) -> Result:
        """Train, or go on with the model that a trial that was cut has left; then make and test updates."""
        dataset = open_text()
        model = trained_model(TrainSpec.from_json(spec["train"]), dataset, context)
        return run_trial(spec, model, dataset, context)

    def report(self, preset: Preset, results: Mapping[str, Result]) -> Report:
        """False accepts, power, tokens, agreement."""
        trials = self.plan(preset, results)
        found = [results[trial.name] for trial in trials if trial.name in results]
        if not found:
            raise no_results(self.name, preset, trials[0].name)
        return sequential_report(found)


EXPERIMENT = Sequential()


def _spec(n_experts: int, seed: int, tokens: int) -> TrainSpec:
    arm = Arm(label=f"4 of {n_experts} experts", hidden=32, experts=n_experts, per_token=4)
    return TrainSpec(arm=arm, seed=seed, tokens=tokens, lr=RATE, expert_lr=RATE, d_model=64, layers=2, evaluations=1)


def run_trial(spec: dict[str, Any], model: Model, dataset: TextDataset, context: TrialContext) -> Result:
    """Updates of some experts of one model, each measured and tested."""
    rows: list[Result] = []
    workshops = _workshops(spec["train"]["seed"], model, dataset)
    for place, workshop in enumerate(workshops):
        context.progress(place, len(workshops), f"experts, {len(rows)} updates tested")
        for number, update in enumerate(workshop.updates(spec["update_seeds"])):
            order = np.random.default_rng([spec["train"]["seed"], place, number])
            rows.append(_tested(update, workshop, order, model.manifest.model.experts_per_layer))
    held_out = dataset.held_out_batches(BATCH, model.trunk.context)
    nats = mean_nats(model.trunk, held_out, model.device)
    return {
        "bits_per_byte": bits_per_byte(nats),
        "experts": model.manifest.model.experts_per_layer,
        "context": model.trunk.context,
        "windows": workshops[0].held_out.n_windows,
        "updates": rows,
    }


def _workshops(seed: int, model: Model, dataset: TextDataset) -> list[Workshop]:
    context = model.trunk.context
    training = [
        dataset.train_batch(step, shard=0, n_shards=1, batch=BATCH, context=context, seed=seed + 1)
        for step in range(TEXT_BATCHES)
    ]
    loads_E = expert_loads(model, training[:LOAD_BATCHES])
    order_E = loads_E.argsort()
    experts = [OneExpert(model, int(order_E[int(place * len(order_E))])) for place in LOADS]
    held_out = reached_by(model, experts, dataset.held_out_batches(BATCH, context))
    texts = reached_by(model, experts, training)
    return [Workshop(*parts) for parts in zip(experts, texts, held_out, strict=True)]


def _tested(update: Update, workshop: Workshop, order: np.random.Generator, n_experts: int) -> Result:
    gains, held_out = update.gains, workshop.held_out
    reached_N = np.bincount(held_out.window_P, minlength=held_out.n_windows)
    config = SequentialTestConfig(worth=WORTH_OF_LAYER / n_experts)
    shuffled_N = order.permutation(len(gains))
    found = decide(gains[shuffled_N], len(gains), config)
    touched_N = shuffled_N[reached_N[shuffled_N] > 0]
    return {
        "expert": workshop.expert.index,
        "kind": update.kind,
        "steps": update.steps,
        "seed": update.seed,
        "gain": float(gains.mean()),
        "worth": config.worth,
        "verdict": found.verdict,
        "why": found.why,
        "windows": found.n_windows,
        "tokens_reached": int(reached_N[shuffled_N[: found.n_windows]].sum()),
        "without_worth": decide(gains[shuffled_N], len(gains), SequentialTestConfig(worth=0.0)).verdict,
        "touched": _decided_on(gains, touched_N, config),
        "peeking": stops_by_peeking(gains[shuffled_N], config.pilot),
    }


def _decided_on(gains: NDArray[np.float64], windows_N: NDArray[np.int64], config: SequentialTestConfig) -> Result:
    """Run the test over those windows alone that hold a token for the expert: the others gain nothing."""
    larger = len(gains) / len(windows_N)
    scaled = SequentialTestConfig(margin=config.margin * larger, worth=config.worth * larger)
    found = decide(gains[windows_N], len(windows_N), scaled)
    return {"verdict": found.verdict, "windows": found.n_windows, "of": len(windows_N)}

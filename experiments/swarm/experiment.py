"""Claim 7: "Far from the distributed training you look for": one model in one process, and over swarms that suffer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.arms.arm import Arm, TrainSpec
from experiments.arms.arms import ArmResults
from experiments.arms.choosing import HASH
from experiments.arms.text import open_text
from experiments.harness.experiment import Trial, no_results
from experiments.live.placement import Placement
from experiments.swarm.report import CLOSE, Roles, swarm_report
from experiments.swarm.trial import run_trial

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.harness.experiment import Preset, Report, Result, TrialContext

HOSTS = 4
DELAY_MEAN_S = 0.1
FAIL = 0.1
AT_ONCE = 4
ONE, ASYNC = "one process", "one process, late gradients"
FEWER, SLOWER = f"{ASYNC}, two at once", f"{ASYNC}, experts at half the rate"
ONCE, TWICE = "one replica", "two replicas"
IN_TURN = f"{ONCE}, no late gradients"
ALL = f"{TWICE}, all of these"


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a preset."""

    tokens: int
    seeds: int
    kills: int
    final_eval_bytes: int


SIZES: dict[Preset, Size] = {
    "quick": Size(tokens=32_768, seeds=1, kills=1, final_eval_bytes=32_768),
    "full": Size(tokens=196_608, seeds=3, kills=6, final_eval_bytes=131_072),
}
RATE = 8e-3
"""The product's, which the recipe was screened with."""

EXPERT_RATES = {SLOWER: RATE / 2}
"""Of arms whose experts learn at another."""


def places(kills: int) -> dict[str, Placement]:
    """Arms by label; what disturbs a swarm comes one by one, then all together."""
    one = Placement(hosts=HOSTS, in_flight=AT_ONCE)
    two = replace(one, replicas=2)
    delays = replace(two, delay_mean_s=DELAY_MEAN_S)
    return {
        ONE: Placement(),
        ASYNC: Placement(in_flight=AT_ONCE),
        FEWER: Placement(in_flight=2),
        SLOWER: Placement(in_flight=AT_ONCE),
        IN_TURN: replace(one, in_flight=1),
        ONCE: one,
        f"{ONCE}, failing calls": replace(one, fail=FAIL),
        TWICE: two,
        f"{TWICE}, delays": delays,
        f"{TWICE}, failing calls": replace(two, fail=FAIL),
        f"{TWICE}, dying hosts": replace(two, kills=kills),
        ALL: replace(delays, fail=FAIL, kills=kills),
    }


FULL = SIZES["full"]
METHOD = f"""
The model and text of [choosing](choosing.md), where a hash of the last one to eight bytes chooses, with 8 of 64 experts
of 32 hidden units and two layers: trunk and experts are trained together on {FULL.tokens:,} tokens, 2,048 a step, in
four micro-batches after each of which the experts step. Weights, text, order and rate are the same for all arms; what
differs is where the experts are.

*{ONE.capitalize()}*: in the trainer's, one micro-batch after the other. *{ASYNC.capitalize()}*: the same with all four
at once, as over a network, where this hides the latency; no network is involved. Two arms try to take back what that
costs: two micro-batches at once instead of four, and experts at half their rate. *{ONCE.capitalize()}*, *{TWICE}*: a
swarm of real nodes on one machine, `python run_node.py coordinator` and {HOSTS} times `python run_node.py host`, found
through the DHT and called over gRPC with TLS and signatures, fp32 on the wire; each block of 16 experts is on one host
or on two, which average it once a second. The trainer's part runs in the trial's own process, with four micro-batches
at once, but in *{IN_TURN}* with one.

*Delays*: every call of the trainer takes longer, exponentially, by {DELAY_MEAN_S * 1000:.0f} ms on average. *Failing
calls*: {FAIL:.0%} of them fail, half of these after the host has done its work. *Dying hosts*: in the middle of a step
a host is killed without a word, and started again with what is on its disk; {FULL.kills} times in all, or fewer where
hosts take long to come back, as the next kill waits for the last one. Delays and failures are drawn with the trial's
seed, and injected where the trainer calls; what hosts say to each other is disturbed by dying alone. Before the
held-out loss is measured the disturbance ends and every replica may be called again: it is a loss of the model, not of
the network.

Held-out text is the same for all arms and their {FULL.seeds} seeds; a difference is taken seed by seed and window by
window. Intervals are of 95 %; a swarm is called far if it is more than {CLOSE:g} nats per byte worse for certain.

What this cannot show: all nodes share one machine, so that no bandwidth is short and hosts compete with the trainer for
its cores. Tokens per second therefore say little, and processor time stands beside them. One trainer, a small model,
few tokens, and a rate that was tuned neither for late gradients nor for so few.
"""


class SwarmExperiment:
    """The experiment."""

    name = "swarm"
    claim = '"Far from the distributed training you look for."'
    method = METHOD

    def plan(self, preset: Preset, results: Mapping[str, Result]) -> Sequence[Trial]:  # noqa: ARG002 - no stages
        """Every arm with each seed, seed by seed; each trial alone, as it is up to six processes and their daemons."""
        size = SIZES[preset]
        return [
            _trial(_spec(label, seed, size), place)
            for seed in range(size.seeds)
            for label, place in places(size.kills).items()
        ]

    def run(self, spec: dict[str, Any], context: TrialContext) -> Result:
        """Train and measure one arm."""
        return run_trial(TrainSpec.from_json(spec["train"]), Placement(**spec["place"]), context, open_text())

    def report(self, preset: Preset, results: Mapping[str, Result]) -> Report:
        """Report on the trials that have a result; raises ConfigError where an arm has none."""
        trials = self.plan(preset, results)
        found = ArmResults([Trial(name=trial.name, spec=trial.spec["train"]) for trial in trials], results)
        missing = [label for label in places(0) if label not in found.labels]
        if missing:
            raise no_results(self.name, preset, missing[0])
        roles = Roles(one=ONE, late=ASYNC, remedies=(FEWER, SLOWER), in_turn=IN_TURN, quiet=TWICE, worst=ALL)
        return swarm_report(found, roles)


EXPERIMENT = SwarmExperiment()


def _spec(label: str, seed: int, size: Size) -> TrainSpec:
    return TrainSpec(
        arm=Arm(label=label, hidden=32, experts=64, per_token=8, gate="hash", recipe=HASH),
        seed=seed,
        tokens=size.tokens,
        lr=RATE,
        expert_lr=EXPERT_RATES.get(label, RATE),
        layers=2,
        final_eval_bytes=size.final_eval_bytes,
    )


def _trial(spec: TrainSpec, place: Placement) -> Trial:
    return Trial(
        name=f"{spec.slug}-seed{spec.seed}", spec={"train": spec.to_json(), "place": asdict(place)}, alone=True
    )

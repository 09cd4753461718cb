"""Trains adapters as a trial says and measures them in every way that it names."""

# Shapes: W windows, T tokens of a window, K experts per token, E experts of a layer, P = T * K pairs of a window.

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from experiments.adapters.adapting import (
    STEP_WINDOWS,
    Gated,
    manifest_for,
    moe_layers,
    n_tokens,
    nats_and_choices,
    nats_per_window,
    train,
    train_apart,
)
from experiments.adapters.apart import arrow, merged, seed_alone
from experiments.adapters.domains import DOMAINS, WEAK
from experiments.adapters.volunteer import volunteer
from experiments.arms.counted import CountedExperts
from experiments.live.placement import Placement, experts_at
from node.trainer.inspection.information import excess
from protocol.manifest import AveragingConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from experiments.adapters.adapting import Adapters
    from experiments.adapters.arms import AdapterTrial, Way
    from experiments.adapters.domains import DomainName
    from experiments.adapters.seed import Seed, Texts
    from experiments.harness.experiment import Result, TrialContext
    from experiments.live.placement import Where
    from node.model.pretrained import PretrainedTrunk
    from protocol.manifest import Manifest

DIGITS = 4


def measure(trial: AdapterTrial, texts: Texts, context: TrialContext) -> Result:
    """Nats per token by way, domain and window; and of the gates that choose, what and how evenly."""
    seed, measuring = texts.seed, _Measuring(texts.seed, texts.tuning if trial.is_tuning else texts.held_out)
    result = measuring.result
    if trial.run is None:
        result["vocabulary"] = seed.manifest.model.vocab_size
        measuring.everywhere("alone", seed_alone(seed))
        return result
    training = {name: texts.training[name][: trial.windows] for name in WEAK}
    result["tokens"] = sum(map(n_tokens, training.values()))
    if trial.is_apart:
        cpu = time.process_time()
        alone = train_apart(trial.run, seed, training, context.progress)
        result["cpu_seconds"] = round(time.process_time() - cpu, 1)
        result["volunteer"] = asdict(volunteer(alone[WEAK[0]].manifest))
        for way in trial.ways:
            _measure_apart(measuring, way, alone)
        return result
    together, place = list(training.values()), Placement(hosts=trial.hosts)
    manifest = manifest_for(trial.run, seed, together)
    manifest = replace(manifest, averaging=AveragingConfig(target_replicas=place.replicas))
    steps = sum(map(len, together)) // STEP_WINDOWS
    with experts_at(place, manifest, steps, context.folder) as where:
        _measure_gated(measuring, manifest, where, together, context)
    return result


def _measure_gated(
    measuring: _Measuring, manifest: Manifest, where: Where, training: list[torch.Tensor], context: TrialContext
) -> None:
    """Adapters that are trained with their gate and measured wherever they are held."""
    result, experts = measuring.result, CountedExperts(where.experts)
    adapters = Gated(manifest, measuring.seed, experts)
    cpu, others = time.process_time(), where.cpu_seconds()
    train(adapters, training, context.progress)
    result["cpu_seconds"] = round(time.process_time() - cpu, 1)
    result["others_cpu_seconds"] = round(where.cpu_seconds() - others, 1)
    result |= {"volunteer": asdict(volunteer(manifest)), "gates": adapters.gate_stats()}
    result |= {"pairs": dict(experts.trained), **where.figures()}
    where.settle()
    measuring.gated("gated", adapters.trunk)
    experts.check_held_out()


def _measure_apart(measuring: _Measuring, way: Way, alone: Mapping[DomainName, Adapters]) -> None:
    """`alone` in the order of WEAK."""
    seed, together = measuring.seed, list(alone.values())
    match way:
        case "own":
            measuring.plain(way, {name: adapters.trunk for name, adapters in alone.items()})
        case "merged":
            measuring.everywhere(way, merged(seed, together))
        case "arrow-1":
            measuring.gated(way, arrow(seed, together, 1))
        case _:
            measuring.everywhere(way, arrow(seed, together, len(together)))


class _Measuring:
    """Measures one seed on some texts, way by way."""

    def __init__(self, seed: Seed, tests: Mapping[DomainName, torch.Tensor]) -> None:
        self.tests, self.seed = tests, seed
        self.result: Result = {"nats": {}, "specialisation": {}, "shares": {}}

    def plain(self, way: Way, trunks: Mapping[DomainName, PretrainedTrunk]) -> None:
        """Measure what is given for each domain."""
        self._keep(way, {name: nats_per_window(trunk, self.tests[name]) for name, trunk in trunks.items()})

    def everywhere(self, way: Way, trunk: PretrainedTrunk) -> None:
        """Measure the same on every domain."""
        self.plain(way, dict.fromkeys(self.tests, trunk))

    def gated(self, way: Way, trunk: PretrainedTrunk) -> None:
        """Measure with a choice for each token, and keep the choices."""
        nats: dict[DomainName, list[float]] = {}
        chosen: dict[DomainName, list[torch.Tensor]] = {}
        for name, ids_WT in self.tests.items():
            nats[name], chosen[name] = nats_and_choices(trunk, ids_WT)
        self._keep(way, nats)
        n_experts = moe_layers(trunk)[0].gate.n_experts
        if n_experts > 1:
            self.result["specialisation"][way] = specialisation(chosen)
        if way == "arrow-1":
            self.result["shares"][way] = {name: shares(ids, n_experts) for name, ids in chosen.items()}

    def _keep(self, way: Way, nats: Mapping[DomainName, list[float]]) -> None:
        self.result["nats"][way] = {name: [round(nat, DIGITS) for nat in own] for name, own in nats.items()}


def specialisation(chosen: Mapping[DomainName, list[torch.Tensor]]) -> list[dict[str, float]]:
    """Return for each layer what its experts tell of the domain, from each domain's choices [W, P]; see `excess`."""
    label_W = np.concatenate(
        [np.full(len(layers[0]), DOMAINS.index(name), dtype=np.int64) for name, layers in chosen.items()]
    )
    rng = np.random.default_rng(0)
    per_layer = zip(*chosen.values(), strict=True)
    return [excess(np.concatenate([ids.numpy() for ids in layer]), label_W, rng) for layer in per_layer]


def shares(per_layer: list[torch.Tensor], n_experts: int) -> list[float]:
    """Part of the choices that falls on each expert, mean over layers."""
    counts_E = torch.stack([torch.bincount(ids.flatten(), minlength=n_experts) for ids in per_layer]).double().mean(0)
    return [round(share, DIGITS) for share in (counts_E / counts_E.sum()).tolist()]

"""Experts in this process that are as far away as if hosts held them: every call takes its time of a virtual clock.

A call meets what `experiments.live.faulty_client` lets real calls meet, and is repeated once when it got lost, as
dispatch repeats it: the host steps its experts at most once. Pairs whose calls got lost twice are dropped.

Shapes: T tokens, D model width, K experts per token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from node.model.moe import LocalExperts
from node.model.pairs import NO_EXPERT, Combined

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.manifest import Manifest
    from tests.support.virtual_clock import VirtualClock

TRIES = 2


class Fate(NamedTuple):
    """Of one call with its repeat, in seconds from its start; None for what never happens."""

    executed_s: float | None
    answered_s: float | None
    ended_s: float

    @classmethod
    def drawn(cls, rng: random.Random, delay_mean_s: float, fail: float) -> Fate:
        """Delays are exponential, half of each before the host has the call."""
        now_s, executed_s = 0.0, None
        for _ in range(TRIES):
            half_s = rng.expovariate(1 / delay_mean_s) / 2 if delay_mean_s else 0.0
            lost, before = rng.random() < fail, rng.random() < 1 / 2
            if executed_s is None and not (lost and before):
                executed_s = now_s + half_s
            if not lost:
                return cls(executed_s, now_s + 2 * half_s, now_s + 2 * half_s)
            now_s += half_s
        return cls(executed_s, None, now_s)


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far the experts are, in `hosts` hosts that hold as many each."""

    delay_mean_s: float
    fail: float
    hosts: int = 2
    seed: int = 0


class FarExperts:
    """`LocalExperts` behind a network, for the functions that `clock` runs."""

    def __init__(self, manifest: Manifest, distance: Distance, clock: VirtualClock) -> None:
        self.local, self._distance, self._clock = LocalExperts(manifest), distance, clock
        self._share = -(-manifest.model.experts_per_layer // distance.hosts)
        self._random = random.Random(distance.seed)
        self.run_tokens = 0
        self.is_near = False
        """Calls are answered at once, by every host."""

    def live_experts(self, layer: int) -> torch.Tensor:
        """Every expert: no host is avoided for what the network does to single calls."""
        return self.local.live_experts(layer)

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        """Sums of the hosts that answered."""
        parts: dict[int, Combined] = {}

        def execute(host: int) -> None:
            ids_TK = torch.where(expert_ids_TK // self._share == host, expert_ids_TK, NO_EXPERT)
            parts[host] = self.local.forward(layer, x_TD, ids_TK, weights_TK, keep=keep)

        answered = self._call(range(self._distance.hosts), execute)
        good = [parts[host] for host in answered]
        combined_TD = sum((part.combined_TD for part in good), torch.zeros_like(x_TD))
        answered_TK = sum((part.answered_TK for part in good), torch.zeros_like(expert_ids_TK, dtype=torch.bool))
        return Combined(combined_TD, answered_TK, {host: parts[host].ticket for host in answered} if keep else None)

    def backward(self, ticket: dict[int, Any], grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the hosts that answered; a host that was reached has stepped either way."""
        self.local.run_tokens = self.run_tokens
        parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def execute(host: int) -> None:
            parts[host] = self.local.backward(ticket[host], grad_TD)

        good = [parts[host] for host in self._call(ticket, execute)]
        n_choices = len(grad_TD) * self.local.manifest.model.experts_per_token
        return (
            sum((tokens for tokens, _ in good), torch.zeros_like(grad_TD)),
            sum((weights for _, weights in good), grad_TD.new_zeros(n_choices)),
        )

    def _call(self, hosts: Any, execute: Callable[[int], None]) -> list[int]:
        """Have every host execute when its call arrives; those whose answers came, once all have ended."""
        if self.is_near:
            for host in hosts:
                execute(host)
            return list(hosts)
        distance, began_s = self._distance, self._clock.now_s
        fates = {host: Fate.drawn(self._random, distance.delay_mean_s, distance.fail) for host in hosts}
        arrivals = [(fate.executed_s, host) for host, fate in fates.items() if fate.executed_s is not None]
        for executed_s, host in sorted(arrivals):
            self._clock.sleep_until(began_s + executed_s)
            execute(host)
        self._clock.sleep_until(began_s + max((fate.ended_s for fate in fates.values()), default=0.0))
        return [host for host, fate in fates.items() if fate.answered_s is not None]

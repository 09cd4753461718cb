"""A trainer in numbers: Prometheus metrics, of its latest step and evaluation, read when scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from node.trainer.events import EvalEvent, StepEvent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from common.events import Event


class TrainerCollector(Collector):
    """Counters and gauges of one trainer; nothing before its first step. Fed by its events, from any thread."""

    def __init__(self) -> None:
        self._step: StepEvent | None = None
        self._held_out: float | None = None

    def on_event(self, event: Event, t_s: float) -> None:  # noqa: ARG002 - what listens to events is given their time
        """Take one event."""
        match event:
            case StepEvent():
                self._step = event
            case EvalEvent(bits_per_byte=bits):
                self._held_out = bits

    def collect(self) -> Iterator[Metric]:
        """Current values."""
        if self._held_out is not None:
            yield GaugeMetricFamily("kilohive_held_out_bits_per_byte", "Loss on held-out text", self._held_out)
        if self._step is not None:
            yield from _of_step(self._step)


def _of_step(step: StepEvent) -> Iterator[Metric]:
    gate = step.gate
    for name, words, value in (
        ("train_bits_per_byte", "Training loss of the latest step", step.bits_per_byte),
        ("train_tokens_per_second", "Tokens a second of the latest step", step.tokens_per_s),
        ("run_tokens", "Tokens of all trainers", step.run_tokens),
        ("experts_alive", "Experts with a live replica", step.experts_alive),
        ("trunk_divergence", "Divergence of the trunk at its last exchange", step.divergence.trunk),
        ("step_staleness", "Mean staleness of the latest step's gradients", step.staleness.mean),
        ("gate_dead_fraction", "Experts not chosen in the last 100 steps", gate.dead_fraction),
        ("gate_load_cv", "Spread of the load of experts, 0 is even", gate.load_cv),
        ("gate_entropy_bits", "Entropy of the load of experts", gate.entropy_bits),
        ("gate_effective_experts", "Experts that a token's weights amount to", gate.effective_k),
    ):
        yield GaugeMetricFamily(f"kilohive_{name}", words, value)
    if gate.kept_fraction is not None:
        words = "Experts of held-out tokens kept since the evaluation before"
        yield GaugeMetricFamily("kilohive_gate_kept_fraction", words, gate.kept_fraction)
    yield CounterMetricFamily("kilohive_train_steps", "Steps of this trainer", step.step)
    yield CounterMetricFamily("kilohive_train_tokens", "Tokens of this trainer", step.own_tokens)
    yield CounterMetricFamily("kilohive_train_calls_ok", "Calls to hosts that were answered", step.calls_ok)
    yield CounterMetricFamily("kilohive_train_calls_failed", "Calls to hosts that failed", step.calls_failed)
    yield CounterMetricFamily("kilohive_train_wire_bytes", "Bytes of calls to hosts, both ways", step.wire_bytes)

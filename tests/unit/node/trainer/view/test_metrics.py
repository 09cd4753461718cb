"""A trainer's metrics: what its latest step and evaluation say, and nothing before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest

from node.trainer.events import EvalEvent
from node.trainer.view.metrics import TrainerCollector
from tests.support.trainer_events import step

if TYPE_CHECKING:
    from node.trainer.events import StepEvent


def scraped(collector: TrainerCollector) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def test_nothing_is_said_before_the_first_step() -> None:
    assert scraped(TrainerCollector()) == {}


def test_the_latest_step_and_evaluation_are_served() -> None:
    collector, first = TrainerCollector(), step(1)
    later: StepEvent = replace(first, step=2, bits_per_byte=1.25, calls_failed=3)
    for event in (first, EvalEvent(step=1, loss=1.7, bits_per_byte=2.5, run_tokens=10), later):
        collector.on_event(event, 0.0)
    values = scraped(collector)
    assert values["kilohive_train_bits_per_byte"] == 1.25
    assert values["kilohive_held_out_bits_per_byte"] == 2.5
    assert values["kilohive_train_steps_total"] == 2
    assert values["kilohive_train_calls_failed_total"] == 3
    assert values["kilohive_gate_effective_experts"] == first.gate.effective_k
    assert values["kilohive_gate_kept_fraction"] == first.gate.kept_fraction

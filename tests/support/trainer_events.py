"""A trainer's events as its display and report get them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from node.trainer.events import (
    Divergences,
    DoneEvent,
    EvalEvent,
    GateLoad,
    GradientStaleness,
    HostLoad,
    ReplicaCounts,
    StepEvent,
    VersionRange,
    WaitingEvent,
)
from protocol.node_events import TrainingStartEvent

PEERS = tuple(f"12D3KooWBmwkXtQAy2bqbBrAA6XzaGhB8Vu6rSYqZ3yQ3VdZ{i:02}" for i in range(64))
T_S = 1000.0


def start(**changes: Any) -> TrainingStartEvent:
    event = TrainingStartEvent(
        run_id="demo-0123456789ab",
        experts=1024,
        hosts=4,
        step=0,
        steps=400,
        tokens_total=1_638_400,
        parameters_trunk=330_000,
        parameters_experts=8_400_000,
        documents=9000,
        bytes_train=4_900_000,
    )
    return replace(event, **changes)


def host(index: int, **changes: Any) -> HostLoad:
    row = HostLoad(
        peer_id=PEERS[index],
        endpoint=f"127.0.0.1:{40000 + index}",
        n_blocks=8,
        queue_tokens=2048,
        tokens_per_s=1300.4,
        avoided=False,
        share=0.25,
    )
    return replace(row, **changes)


def step(number: int, **changes: Any) -> StepEvent:
    event = StepEvent(
        step=number,
        steps=400,
        loss=2.356,
        bits_per_byte=3.4,
        run_tokens=4096 * number,
        own_tokens=4096 * number,
        trainers=1,
        tokens_per_s=5123.2,
        in_flight=2,
        experts_alive=1024,
        experts_total=1024,
        calls_ok=32 * number,
        calls_failed=0,
        wire_bytes=8_400_000 * number,
        wire_bytes_per_token=4251.3,
        time_left_s=0.5 * (400 - number),
        grad_norm=1.2,
        lr=1e-3,
        gate=GateLoad(
            dead_fraction=0.012,
            load_cv=0.43,
            entropy_bits=8.31,
            overflow=14_968,
            effective_k=6.93,
            kept_fraction=0.921,
            entropy_bits_by_layer=(8.0, 8.62),
            load_cv_by_layer=(0.25, 0.61),
            dead_by_layer=(2, 10),
        ),
        replicas=ReplicaCounts(min=1, mean=1.5),
        versions=VersionRange(min=1203, max=1450),
        staleness=GradientStaleness(mean=1.25, max=12),
        divergence=Divergences(trunk=0.0021, blocks=0.0312),
        exchanged_bytes=1_200_000_000,
        hosts=tuple(host(i) for i in range(4)),
    )
    return replace(event, **changes)


def step_s(number: int) -> float:
    """When the step of that number was told."""
    return T_S + 0.5 * number


def evaluation(number: int, bits_per_byte: float) -> EvalEvent:
    return EvalEvent(step=number, loss=bits_per_byte * 0.693, bits_per_byte=bits_per_byte, run_tokens=4096 * number)


def waiting(what: str = "hosts: 12 of 32 blocks have no live replica") -> WaitingEvent:
    return WaitingEvent(for_=what)


def done(**changes: Any) -> DoneEvent:
    event = DoneEvent(
        run_id="demo-0123456789ab",
        experts=1024,
        hosts=4,
        trainers=1,
        steps=400,
        tokens=1_638_400,
        bits_per_byte_start=8.01,
        bits_per_byte_end=3.05,
        tokens_per_s=5123.4,
        calls_failed=2,
        wall_s=171.0,
        own_tokens=1_638_400,
        calls_ok=12_800,
        wire_bytes=3_360_000_000,
        exchanged_bytes=1_200_000_000,
        train_s=160.0,
        sample="The city of the \x1b[31mnorth",
        attribution="Wikipedia, CC BY-SA 4.0",
        files=("runs/demo/summary.json", "runs/demo/loss.png"),
    )
    return replace(event, **changes)

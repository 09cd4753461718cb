from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dht.view import DirectoryView, PeerInfo, Replica
from node.model.gate import build_gate
from node.model.gate.stats import ChoiceSummary
from node.trainer.step_report import StepReport, step_event
from node.trainer.train_step import StepResult
from node.trainer.trunk_state import TrainingProgress
from protocol.manifest import BlockId
from tests.support.events import as_written
from tests.support.swarm_parts import make_replica, small_manifest

if TYPE_CHECKING:
    from node.model.gate import Gate
    from protocol.announcements import Role


class FakeDirectory:
    """One replica per block of layer 0: two peers, of which `away` is avoided."""

    def __init__(self, away: frozenset[str] = frozenset()) -> None:
        self._away = away
        owners = {0: "a", 1: "a", 2: "b", 3: "b"}
        replicas: dict[BlockId, tuple[Replica, ...]] = {
            BlockId(0, n): (make_replica(BlockId(0, n), peer, f"{peer}:1"),) for n, peer in owners.items()
        }
        ahead = replace(make_replica(BlockId(0, 0), "b", "b:1"), version=90, divergence=0.25)
        replicas[BlockId(0, 0)] = (*replicas[BlockId(0, 0)], ahead)
        self._view = DirectoryView(replicas=replicas, peers=(peer("a", "host", 500), peer("t", "trainer", 9999)))

    def snapshot(self, *, with_avoided: bool = False) -> DirectoryView:
        return self._view if with_avoided else self._view.without(self._away)


def peer(peer_id: str, role: Role, exchanged_bytes: int) -> PeerInfo:
    return PeerInfo(
        peer_id=peer_id,
        role=role,
        endpoint="",
        software="",
        started_s=0.0,
        n_blocks=0,
        tokens_per_s=0.0,
        run_tokens=0,
        queue_tokens=0,
        expiration_s=2e9,
        exchanged_bytes=exchanged_bytes,
    )


def gate_after(*load: int) -> Gate:
    """A gate of 16 experts, after one step that gave the first of them so many tokens each."""
    gate = build_gate(small_manifest().model, torch.Generator().manual_seed(0))
    gate.observe(ChoiceSummary(load_E=torch.tensor([*load, *[0] * (16 - len(load))])))
    return gate


def event(directory: FakeDirectory, pairs: Counter[str], *gates: Gate) -> dict[str, Any]:
    result = StepResult(loss=1.0, grad_norm=0.5, lr=1e-3, n_tokens=100, overflow=3, seconds=0.5)
    report = StepReport(
        result=result,
        progress=TrainingProgress(
            step=10, run_tokens=3000, own_tokens=1000, train_seconds=5.0, calls_ok=40, calls_failed=2, wire_bytes=12345
        ),
        steps=30,
        experts_total=16,
        trainers=3,
        staleness=(1.234, 7),
        divergence=0.012345,
        exchanged_bytes=1000,
        step_wire_bytes=4250,
    )
    return as_written(step_event(report, gates or [gate_after()], directory, pairs))  # type: ignore[arg-type]


def test_the_step_event_has_rates_shares_and_time_left() -> None:
    told = event(FakeDirectory(), Counter(a=30, b=10))
    assert told["tokens_per_s"] == 200.0
    assert (told["wire_bytes"], told["wire_bytes_per_token"]) == (12345, 42.5)
    assert told["time_left_s"] == 10.0
    assert told["bits_per_byte"] == 1.4427
    assert told["experts_alive"] == 16
    assert (told["calls_ok"], told["calls_failed"]) == (40, 2)
    hosts = told["hosts"]
    assert isinstance(hosts, list)
    assert [(row["peer_id"], row["share"], row["n_blocks"], row["avoided"]) for row in hosts] == [
        ("a", 0.75, 2, False),
        ("b", 0.25, 3, False),
    ]


def test_an_avoided_host_is_shown_but_its_experts_do_not_count_as_alive() -> None:
    told = event(FakeDirectory(away=frozenset({"b"})), Counter(a=30))
    hosts = told["hosts"]
    assert isinstance(hosts, list)
    assert [row["avoided"] for row in hosts] == [False, True]
    assert told["experts_alive"] == 8


def test_the_step_event_says_how_far_the_replicas_are_in_sync() -> None:
    told = event(FakeDirectory(), Counter())
    assert (told["run_tokens"], told["own_tokens"], told["trainers"]) == (3000, 1000, 3)
    assert told["replicas"] == {"min": 1, "mean": 1.25}
    assert told["versions"] == {"min": 0, "max": 90}
    assert told["staleness"] == {"mean": 1.23, "max": 7}
    assert told["divergence"] == {"trunk": 0.0123, "blocks": 0.25}
    assert told["exchanged_bytes"] == 1000 + 500


def test_the_step_event_tells_of_the_load_of_each_layer() -> None:
    told = event(FakeDirectory(), Counter(), gate_after(*[5] * 16), gate_after(5, 5, 5, 5))["gate"]
    assert told["entropy_bits_by_layer"] == [4.0, 2.0]
    assert told["load_cv_by_layer"] == [0.0, 1.7321]
    assert told["dead_by_layer"] == [0, 12]
    assert (told["entropy_bits"], told["dead_fraction"]) == (3.0, 12 / 32)


def test_a_run_without_a_single_replica_has_a_step_event_too() -> None:
    directory = FakeDirectory()
    directory._view = DirectoryView(replicas={BlockId(0, n): () for n in range(4)})
    told = event(directory, Counter())
    assert told["replicas"] == {"min": 0, "mean": 0.0}
    assert told["versions"] == {"min": 0, "max": 0}
    assert told["experts_alive"] == 0

from __future__ import annotations

from collections import Counter

import torch

from dht.view import DirectoryView
from node.gate import build_gate
from node.progress import StepReport, step_event
from node.training import StepResult
from node.trunk_state import Progress
from protocol.manifest import BlockId
from tests.support.swarm_parts import make_replica, small_manifest


class FakeDirectory:
    """One replica per block of layer 0: two peers, of which `away` is avoided."""

    def __init__(self, away: frozenset[str] = frozenset()) -> None:
        self._away = away
        owners = {0: "a", 1: "a", 2: "b", 3: "b"}
        self._view = DirectoryView(
            replicas={BlockId(0, n): (make_replica(BlockId(0, n), peer, f"{peer}:1"),) for n, peer in owners.items()}
        )

    def snapshot(self, *, with_avoided: bool = False) -> DirectoryView:
        return self._view if with_avoided else self._view.without(self._away)


def event(directory: FakeDirectory, pairs: Counter[str]) -> dict[str, object]:
    result = StepResult(loss=1.0, grad_norm=0.5, lr=1e-3, n_tokens=100, overflow=3, seconds=0.5)
    report = StepReport(
        result=result,
        progress=Progress(step=10, run_tokens=1000, train_seconds=5.0),
        steps=30,
        calls=(40, 2),
        wire_bytes=12345,
        experts_total=16,
    )
    gate = build_gate(small_manifest().model, torch.Generator().manual_seed(0))
    return step_event(report, [gate], directory, pairs)  # type: ignore[arg-type]


def test_the_step_event_has_rates_shares_and_time_left() -> None:
    told = event(FakeDirectory(), Counter(a=30, b=10))
    assert told["tokens_per_s"] == 200.0
    assert told["time_left_s"] == 10.0
    assert told["bits_per_byte"] == 1.4427
    assert told["experts_alive"] == 16
    assert (told["calls_ok"], told["calls_failed"]) == (40, 2)
    hosts = told["hosts"]
    assert isinstance(hosts, list)
    assert [(row["peer_id"], row["share"], row["n_blocks"], row["avoided"]) for row in hosts] == [
        ("a", 0.75, 2, False),
        ("b", 0.25, 2, False),
    ]


def test_an_avoided_host_is_shown_but_its_experts_do_not_count_as_alive() -> None:
    told = event(FakeDirectory(away=frozenset({"b"})), Counter(a=30))
    hosts = told["hosts"]
    assert isinstance(hosts, list)
    assert [row["avoided"] for row in hosts] == [False, True]
    assert told["experts_alive"] == 8

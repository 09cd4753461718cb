"""What a trainer tells after each step: the `step` event, for the display, for programs, for the plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.model.transformer import bits_per_byte
from node.trainer.events import (
    Divergences,
    GateLoad,
    GradientStaleness,
    HostLoad,
    ReplicaCounts,
    StepEvent,
    VersionRange,
)

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    from dht.directory import Directory
    from dht.view import DirectoryView, Replica
    from node.model.gate import Gate
    from node.trainer.train_step import StepResult
    from node.trainer.trunk_state import TrainingProgress


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step with totals so far, as one trainer has them.

    `steps` is how many this trainer is expected to take in all, `trainers` how many are live; `staleness` is mean and
    most of this step's backwards, in optimizer steps of the experts; `divergence` the trunk's; `exchanged_bytes` what
    this trainer has sent and received to average it; `step_wire_bytes` what this step's calls were and were answered.
    `bytes_per_token` of the training text.
    """

    result: StepResult
    progress: TrainingProgress
    steps: int
    experts_total: int
    trainers: int = 1
    staleness: tuple[float, int] = (0.0, 0)
    divergence: float = 0.0
    exchanged_bytes: int = 0
    step_wire_bytes: int = 0
    bytes_per_token: float = 1.0


def step_event(report: StepReport, gates: Sequence[Gate], directory: Directory, pairs: Counter[str]) -> StepEvent:
    """The `step` event; `pairs` counts those that each peer answered in this step."""
    usable, known = directory.snapshot(), directory.snapshot(with_avoided=True)
    result, progress = report.result, report.progress
    seconds_per_step = progress.train_seconds / max(1, progress.step)
    replicas = [replica for replicas in known.replicas.values() for replica in replicas]
    versions = [replica.version for replica in replicas] or [0]
    return StepEvent(
        step=progress.step,
        steps=report.steps,
        loss=round(result.loss, 5),
        bits_per_byte=round(bits_per_byte(result.loss, report.bytes_per_token), 5),
        run_tokens=progress.run_tokens,
        own_tokens=progress.own_tokens,
        trainers=report.trainers,
        tokens_per_s=round(result.n_tokens / result.seconds, 1),
        in_flight=result.in_flight,
        experts_alive=sum(replicas[0].n_experts for replicas in usable.replicas.values() if replicas),
        experts_total=report.experts_total,
        calls_ok=progress.calls_ok,
        calls_failed=progress.calls_failed,
        wire_bytes=progress.wire_bytes,
        wire_bytes_per_token=round(report.step_wire_bytes / (result.n_tokens * len(gates)), 1),
        time_left_s=round((report.steps - progress.step) * seconds_per_step, 1),
        grad_norm=round(result.grad_norm, 4),
        lr=result.lr,
        gate=_gate_load(gates, result.overflow),
        replicas=_replica_counts(known),
        versions=VersionRange(min=min(versions), max=max(versions)),
        staleness=GradientStaleness(mean=round(report.staleness[0], 2), max=report.staleness[1]),
        divergence=_divergences(report, replicas),
        exchanged_bytes=report.exchanged_bytes + _announced_bytes(known),
        hosts=_host_loads(known, usable, pairs),
    )


def _replica_counts(known: DirectoryView) -> ReplicaCounts:
    counts = [len(replicas) for replicas in known.replicas.values()] or [0]
    return ReplicaCounts(min=min(counts), mean=round(sum(counts) / len(counts), 2))


def _divergences(report: StepReport, replicas: Sequence[Replica]) -> Divergences:
    return Divergences(
        trunk=_three_digits(report.divergence),
        blocks=_three_digits(max((replica.divergence for replica in replicas), default=0.0)),
    )


def _announced_bytes(known: DirectoryView) -> int:
    """What the hosts say that they have exchanged."""
    return sum(peer.exchanged_bytes for peer in known.peers if peer.role == "host")


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def _gate_load(gates: Sequence[Gate], overflow: int) -> GateLoad:
    stats = [gate.stats() for gate in gates]
    n = len(stats)
    kept = [s.kept_fraction for s in stats if s.kept_fraction is not None]
    return GateLoad(
        dead_fraction=round(sum(s.dead_fraction for s in stats) / n, 4),
        load_cv=round(sum(s.load_cv for s in stats) / n, 4),
        entropy_bits=round(sum(s.load_entropy_bits for s in stats) / n, 4),
        overflow=overflow,
        effective_k=round(sum(s.effective_k for s in stats) / n, 4),
        kept_fraction=round(sum(kept) / len(kept), 4) if kept else None,
        entropy_bits_by_layer=tuple(round(s.load_entropy_bits, 4) for s in stats),
        load_cv_by_layer=tuple(round(s.load_cv, 4) for s in stats),
        dead_by_layer=tuple(round(s.dead_fraction * s.n_live) for s in stats),
    )


def _host_loads(known: DirectoryView, usable: DirectoryView, pairs_by_peer: Counter[str]) -> tuple[HostLoad, ...]:
    """Every live host, those that are avoided for now included; `share` is of this step's pairs."""
    total = sum(pairs_by_peer.values()) or 1
    usable_peers = usable.load_by_peer()
    endpoints = {r.peer_id: r.endpoint for replicas in known.replicas.values() for r in replicas}
    peers = {peer.peer_id: peer for peer in known.peers}
    return tuple(
        HostLoad(
            peer_id=peer_id,
            endpoint=endpoints[peer_id],
            n_blocks=load.n_blocks,
            queue_tokens=peers[peer_id].queue_tokens if peer_id in peers else 0,
            tokens_per_s=round(peers[peer_id].tokens_per_s if peer_id in peers else 0.0, 1),
            avoided=peer_id not in usable_peers,
            share=round(pairs_by_peer[peer_id] / total, 4),
        )
        for peer_id, load in sorted(known.load_by_peer().items())
    )

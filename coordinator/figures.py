"""A run in numbers, from one view of its directory: what `status` prints and what the run's page shows. Pure functions.

What is measured by trainers is believed as they report it; counts of peers and blocks are this node's own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from dht.record_versions import PERIOD_S, TTL_S
from protocol.announcements import ROLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dht.view import DirectoryView, PeerInfo, Replica
    from protocol.manifest import Manifest
    from protocol.reports import TrainerReport

SILENT_S = 2 * PERIOD_S
"""A peer that has not renewed its record for so long may be gone; it is forgotten when the record expires."""


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """One layer: its blocks of experts as hosts announce them, and their load as trainers report it.

    `replicas`: live ones of each block, in the blocks' order. `joining`: replicas that are being downloaded. Versions,
    `gap` and `divergence` are None where there is nothing to compare. `hosts`, `queue_tokens` and `tokens_per_s` are of
    hosts with a block of this layer, for all their blocks together. `load_entropy_bits` and `load_cv` are means over
    trainers; `dead_experts` were chosen by no trainer, so the trainer with the fewest says at most how many.
    """

    layer: int
    replicas: tuple[int, ...]
    joining: int
    version_min: int | None
    version_max: int | None
    gap: int | None
    divergence: float | None
    hosts: int
    queue_tokens: int
    tokens_per_s: float
    load_entropy_bits: float | None
    load_cv: float | None
    dead_experts: int | None

    @property
    def live(self) -> int:
        """Blocks with a live replica."""
        return sum(count > 0 for count in self.replicas)


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """A whole run at one moment; None stands for what nobody has told.

    `peers` by role; `silent` of them have not been heard lately. `tokens_per_s` is what trainers train,
    `answered_tokens_per_s` what hosts answer. `held_out_bits_per_byte` is the latest evaluation, at `held_out_tokens`
    of the run; `train_bits_per_byte` the mean of the trainers' latest steps, as `load_entropy_bits` and `load_cv` are
    means over layers and trainers. `staleness`: mean over hosts, in optimizer steps. `exchanged_bytes`: of averaging
    and downloads, both ends counted; `wire_bytes`: of trainers' calls.
    """

    taken_s: float
    peers: Mapping[str, int]
    silent: int
    paused: int
    experts: int
    experts_alive: int
    blocks: int
    blocks_lost: int
    replicas_min: int
    replicas_mean: float
    target_replicas: int
    run_tokens: int
    total_tokens: int
    tokens_per_s: float
    answered_tokens_per_s: float
    queue_tokens: int
    held_out_bits_per_byte: float | None
    held_out_tokens: int | None
    train_bits_per_byte: float | None
    load_entropy_bits: float | None
    load_cv: float | None
    dead_experts: int | None
    staleness: float | None
    version_gap: int | None
    divergence: float | None
    trunk_version_gap: int | None
    trunk_divergence: float | None
    calls_ok: int | None
    calls_failed: int | None
    wire_bytes: int | None
    exchanged_bytes: int


@dataclass(frozen=True, kw_only=True)
class PeerFigures:
    """One peer with its live replicas. `tokens`: answered by a host since its start, trained on by a trainer.

    `heard_s`: since it last renewed its record, as far as its expiration tells.
    """

    peer: PeerInfo
    replicas: tuple[Replica, ...]
    tokens: int
    heard_s: float

    @property
    def is_silent(self) -> bool:
        """Whether it should have been heard again by now."""
        return self.heard_s > SILENT_S


def run_figures(manifest: Manifest, view: DirectoryView, layers: Sequence[LayerFigures]) -> RunFigures:
    """The run as a whole; `layers` are those of the same view."""
    model, counts = manifest.model, [count for layer in layers for count in layer.replicas]
    reports = [reported.said for reported in view.reports]
    held_out = _latest_evaluation(reports)
    trunks = [replica for replica in view.trunk if replica.state == "serving"]
    working = [peer.staleness for peer in view.peers if peer.role == "host" and not peer.paused]
    return RunFigures(
        taken_s=view.taken_s,
        peers=dict.fromkeys(ROLES, 0) | Counter(peer.role for peer in view.peers),
        silent=sum(heard_s(peer, view.taken_s) > SILENT_S for peer in view.peers),
        paused=sum(peer.paused for peer in view.peers),
        experts=model.experts_per_layer * model.n_layers,
        experts_alive=sum(replicas[0].n_experts for replicas in view.replicas.values() if replicas),
        blocks=len(counts),
        blocks_lost=counts.count(0),
        replicas_min=min(counts, default=0),
        replicas_mean=round(fmean(counts), 2) if counts else 0.0,
        target_replicas=manifest.averaging.target_replicas,
        run_tokens=max((peer.run_tokens for peer in view.peers if peer.role == "trainer"), default=0),
        total_tokens=manifest.optimizer.total_tokens,
        tokens_per_s=_trained_per_s(view),
        answered_tokens_per_s=sum(peer.tokens_per_s for peer in view.peers if peer.role == "host"),
        queue_tokens=sum(peer.queue_tokens for peer in view.peers),
        held_out_bits_per_byte=held_out[1] if held_out else None,
        held_out_tokens=held_out[0] if held_out else None,
        train_bits_per_byte=_mean(report.train_bits_per_byte for report in reports),
        load_entropy_bits=_mean(layer.load_entropy_bits for layer in layers),
        load_cv=_mean(layer.load_cv for layer in layers),
        dead_experts=_sum(layer.dead_experts for layer in layers),
        staleness=_mean(working),
        version_gap=largest_gap(view.replicas.values()),
        divergence=largest_divergence(view.replicas.values()),
        trunk_version_gap=largest_gap([trunks]),
        trunk_divergence=largest_divergence([trunks]),
        calls_ok=_sum(report.calls_ok for report in reports),
        calls_failed=_sum(report.calls_failed for report in reports),
        wire_bytes=_sum(report.wire_bytes for report in reports),
        exchanged_bytes=sum(peer.exchanged_bytes for peer in view.peers),
    )


def layer_figures(manifest: Manifest, view: DirectoryView) -> tuple[LayerFigures, ...]:
    """Every layer of the run, in order."""
    n_layers = manifest.model.n_layers
    rows: list[list[Sequence[Replica]]] = [[] for _ in range(n_layers)]
    for block, replicas in view.replicas.items():
        rows[block.layer].append(replicas)
    joining = Counter(replica.block.layer for replica in view.others if replica.state == "joining")
    reports = [reported.said for reported in view.reports if len(reported.said.load_cv) == n_layers]
    return tuple(_layer(layer, rows[layer], joining[layer], reports) for layer in range(n_layers))


def peer_figures(view: DirectoryView) -> tuple[PeerFigures, ...]:
    """Every peer, in the order of the view; the replicas of each are in the order of its blocks."""
    hosted: defaultdict[str, list[Replica]] = defaultdict(list)
    for replicas in view.replicas.values():
        for replica in replicas:
            hosted[replica.peer_id].append(replica)
    return tuple(_peer(peer, hosted.get(peer.peer_id, ()), view.taken_s) for peer in view.peers)


def heard_s(peer: PeerInfo, now_s: float) -> float:
    """Seconds since the peer renewed its record; 0 of one whose records live longer than others'."""
    return max(0.0, TTL_S - (peer.expiration_s - now_s))


def largest_gap(rows: Iterable[Sequence[Replica]]) -> int | None:
    """Optimizer steps between the newest and the oldest replica of one block, at most; None if none has two.

    `rows`: the replicas of each block.
    """
    versions = [[replica.version for replica in row] for row in rows if len(row) > 1]
    return max((max(row) - min(row) for row in versions), default=None)


def largest_divergence(rows: Iterable[Sequence[Replica]]) -> float | None:
    """What replicas of blocks that have several differ by, at most; None if no block has two."""
    return max((replica.divergence for row in rows if len(row) > 1 for replica in row), default=None)


def _peer(peer: PeerInfo, replicas: Sequence[Replica], now_s: float) -> PeerFigures:
    answered = max((replica.tokens_total for replica in replicas), default=0)  # each tells the whole of its host
    tokens = peer.own_tokens if peer.role == "trainer" else answered
    return PeerFigures(peer=peer, replicas=tuple(replicas), tokens=tokens, heard_s=heard_s(peer, now_s))


def _layer(
    layer: int, rows: Sequence[Sequence[Replica]], joining: int, reports: Sequence[TrainerReport]
) -> LayerFigures:
    replicas = [replica for row in rows for replica in row]
    versions = [replica.version for replica in replicas]
    hosts = {replica.peer_id: replica for replica in replicas}  # a host has one queue, for all its blocks
    return LayerFigures(
        layer=layer,
        replicas=tuple(map(len, rows)),
        joining=joining,
        version_min=min(versions, default=None),
        version_max=max(versions, default=None),
        gap=largest_gap(rows),
        divergence=largest_divergence(rows),
        hosts=len(hosts),
        queue_tokens=sum(replica.queue_tokens for replica in hosts.values()),
        tokens_per_s=sum(replica.tokens_per_s for replica in hosts.values()),
        load_entropy_bits=_mean(report.load_entropy_bits[layer] for report in reports),
        load_cv=_mean(report.load_cv[layer] for report in reports),
        dead_experts=min((report.dead_experts[layer] for report in reports), default=None),
    )


def _trained_per_s(view: DirectoryView) -> float:
    """Return the speed of each trainer's latest step if it reports one, else its mean over the run."""
    latest = {reported.peer_id: reported.said.tokens_per_s for reported in view.reports}
    trainers = [peer for peer in view.peers if peer.role == "trainer"]
    return sum(latest.get(peer.peer_id, peer.tokens_per_s) for peer in trainers)


def _latest_evaluation(reports: Iterable[TrainerReport]) -> tuple[int, float] | None:
    """Tokens of the run, and bits per byte; of several at the same tokens the lowest."""
    latest = [
        (report.evaluated_tokens[-1], report.held_out_bits_per_byte[-1])
        for report in reports
        if report.evaluated_tokens
    ]
    return max(latest, key=lambda found: (found[0], -found[1]), default=None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None

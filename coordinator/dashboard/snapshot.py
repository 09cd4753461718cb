"""What the pages show, gathered once after each look at the DHT: immutable, and computed once for all clients."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from coordinator.figures import layer_figures, peer_figures, run_figures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.figures import LayerFigures, PeerFigures, RunFigures
    from dht.view import DirectoryView, Reported
    from protocol.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A peer and its place among those of its role, from 1, by tokens."""

    rank: int
    row: PeerFigures
    words: str
    """What a search looks in: its id and its endpoint, in lower case."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one moment. `peers` are in the order of their tokens, the most first; `reports` by peer id."""

    manifest: Manifest
    view: DirectoryView
    figures: RunFigures
    layers: tuple[LayerFigures, ...]
    peers: tuple[Ranked, ...]
    by_id: Mapping[str, Ranked]
    reports: Mapping[str, Reported]


def take_snapshot(manifest: Manifest, view: DirectoryView) -> Snapshot:
    """Gather all that pages show of one view. It takes a fraction of a second for a run of ten thousand peers."""
    layers, peers = layer_figures(manifest, view), _ranked(peer_figures(view))
    return Snapshot(
        manifest=manifest,
        view=view,
        figures=run_figures(manifest, view, layers),
        layers=layers,
        peers=peers,
        by_id=MappingProxyType({ranked.row.peer.peer_id: ranked for ranked in peers}),
        reports=MappingProxyType({reported.peer_id: reported for reported in view.reports}),
    )


def _ranked(rows: Sequence[PeerFigures]) -> tuple[Ranked, ...]:
    ranks = Counter[str]()
    ranked = []
    for row in sorted(rows, key=lambda row: (-row.tokens, row.peer.peer_id)):
        ranks[row.peer.role] += 1
        words = f"{row.peer.peer_id} {row.peer.endpoint}".lower()
        ranked.append(Ranked(rank=ranks[row.peer.role], row=row, words=words))
    return tuple(ranked)

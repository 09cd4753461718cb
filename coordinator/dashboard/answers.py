"""What a page is given, as JSON of a bounded size however large the run is. Pure functions of a snapshot.

Lists come in parts: one page of rows, and how many there are. A heat map has one character for a block, or for several
blocks of a large run.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Final, Literal

from common.errors import InvalidInputError
from coordinator.blocks import short_block_list_text
from coordinator.figures import largest_divergence, largest_gap
from protocol.endpoints import endpoint_text
from protocol.manifest import BlockId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.credit.sums import HostSum, TeamSum, TrainerSum
    from coordinator.dashboard.credit import CreditWatch
    from coordinator.dashboard.history import Curves
    from coordinator.dashboard.snapshot import Ranked, Snapshot
    from coordinator.figures import LayerFigures
    from dht.view import Replica

MAX_CELLS: Final = 4096
"""Characters of a heat map, of all its layers together."""
ROWS: Final = 50
"""Rows of a list that are given at once."""
MAX_NAMED: Final = 5
"""Peers or hosts that are named where only their number matters."""
MAX_TRAINERS: Final = 50
MAX_SEARCH_CHARS: Final = 100
MANY: Final = 10
DIGITS: Final = 6

Json = dict[str, Any]
CreditKind = Literal["hosts", "trainers", "teams"]


def encoded(value: object) -> bytes:
    """JSON as it is sent, with fractions to six digits."""
    return json.dumps(_rounded(value), separators=(",", ":"), allow_nan=False).encode()


def overview(snapshot: Snapshot, problem: str) -> Json:
    """The whole run; `problem` is why the snapshot is older than it should be, if it is."""
    model = snapshot.manifest.model
    return {
        "run_id": snapshot.manifest.run_id,
        "problem": problem,
        "about": {
            "layers": model.n_layers,
            "experts_per_layer": model.experts_per_layer,
            "experts_per_block": model.experts_per_block,
            "experts_per_token": model.experts_per_token,
            "gate": model.gate,
            "codec": snapshot.manifest.codec,
        },
        "figures": asdict(snapshot.figures),
        "layers": _columns(snapshot.layers),
        "cells": _cells(snapshot.layers),
        "silent": [_named(ranked) for ranked in snapshot.peers if ranked.row.is_silent][:MAX_NAMED],
        "lost": short_block_list_text(snapshot.view.lost_blocks()),
    }


def peers(snapshot: Snapshot, role: str, search: str, page: int) -> Json:
    """Peers of a role (or "all") whose id or endpoint holds `search`, by tokens. Raises InvalidInputError."""
    if len(search) > MAX_SEARCH_CHARS:
        raise InvalidInputError("search", f"must be at most {MAX_SEARCH_CHARS} characters, is {len(search)}")
    words = search.strip().lower()
    found = [ranked for ranked in snapshot.peers if role in {"all", ranked.row.peer.role} and words in ranked.words]
    rows, part = _page(found, page)
    return {**part, "rows": [_peer_row(ranked, snapshot.view.taken_s) for ranked in rows]}


def peer(snapshot: Snapshot, peer_id: str, page: int) -> Json | None:
    """One peer, and a page of its blocks; None for one that is not announced now."""
    ranked = snapshot.by_id.get(peer_id)
    if ranked is None:
        return None
    said, reported = ranked.row.peer, snapshot.reports.get(peer_id)
    replicas, part = _page(ranked.row.replicas, page)
    others = Counter(replica.state for replica in snapshot.view.others if replica.peer_id == peer_id)
    trunk = next((replica for replica in snapshot.view.trunk if replica.peer_id == peer_id), None)
    return {
        **_peer_row(ranked, snapshot.view.taken_s),
        "software": said.software,
        "started_s": said.started_s,
        "run_tokens": said.run_tokens,
        "is_relay": bool(said.relay),
        "evaluators": len(said.evaluators),
        "hosted": short_block_list_text(replica.block for replica in ranked.row.replicas),
        "joining": others["joining"],
        "stored": others["stored"],
        "trunk": None if trunk is None else {"version": trunk.version, "divergence": trunk.divergence},
        "report": None if reported is None else asdict(reported.said),
        "replicas": {**part, "rows": [_replica_row(snapshot, replica) for replica in replicas]},
    }


def layer(snapshot: Snapshot, number: int, page: int) -> Json:
    """One layer, and a page of its blocks. Raises InvalidInputError for one that the run does not have."""
    if not 0 <= number < len(snapshot.layers):
        raise InvalidInputError("layer", f"must be from 0 to {len(snapshot.layers) - 1}, is {number}")
    figures = snapshot.layers[number]
    blocks, part = _page(range(len(figures.replicas)), page)
    trainers = [
        {"peer_id": reported.peer_id, **{name: getattr(reported.said, name)[number] for name in _BY_LAYER}}
        for reported in snapshot.view.reports
        if len(reported.said.load_cv) == len(snapshot.layers)
    ]
    return {
        "figures": _layer_row(figures),
        "target_replicas": snapshot.figures.target_replicas,
        "experts_per_block": snapshot.manifest.model.experts_per_block,
        "cells": _cells([figures]),
        "blocks": {**part, "rows": [_block_row(snapshot, BlockId(number, block)) for block in blocks]},
        "n_trainers": len(trainers),
        "trainers": trainers[:MAX_TRAINERS],
    }


def credit(watch: CreditWatch, kind: CreditKind, page: int) -> Json:
    """A page of what hosts, trainers or teams have earned, those with most first."""
    earned: Mapping[CreditKind, Sequence[HostSum | TrainerSum | TeamSum]] = {
        "hosts": watch.sums.hosts,
        "trainers": watch.sums.trainers,
        "teams": watch.sums.teams,
    }
    rows, part = _page(earned[kind], page)
    first = (part["page"] - 1) * ROWS + 1
    return {
        **part,
        "problem": watch.problem,
        "unseen_receipts": watch.sums.unseen_receipts,
        "rows": [{"rank": rank, **asdict(row)} for rank, row in enumerate(rows, first)],
    }


def curves(found: Curves, evaluations: Sequence[tuple[int, float]]) -> Json:
    """Figures over time, and held-out loss over tokens."""
    return {
        "t_s": found.t_s,
        "figures": dict(found.figures),
        "evaluations": {
            "tokens": [tokens for tokens, _ in evaluations],
            "bits_per_byte": [bits for _, bits in evaluations],
        },
    }


_BY_LAYER: Final = ("load_entropy_bits", "load_cv", "dead_experts")


def _columns(layers: Sequence[LayerFigures]) -> Json:
    """A list for each figure: with 256 layers that is a third of a list of objects."""
    rows = [_layer_row(layer) for layer in layers]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _layer_row(layer: LayerFigures) -> Json:
    """Return all of a layer but the replicas of each block, which may be many."""
    named = {field.name: getattr(layer, field.name) for field in fields(layer) if field.name != "replicas"}
    return {**named, "live": layer.live, "blocks": len(layer.replicas)}


def _cells(layers: Sequence[LayerFigures]) -> Json:
    """A text for each layer, whose characters are the fewest replicas of `group` neighbouring blocks: 0 to 9, or +."""
    per_layer = max((len(layer.replicas) for layer in layers), default=0)
    group = -(-per_layer // max(1, MAX_CELLS // max(1, len(layers)))) or 1
    return {"group": group, "layers": [_cells_of(layer.replicas, group) for layer in layers]}


def _cells_of(counts: Sequence[int], group: int) -> str:
    fewest = [min(counts[at : at + group]) for at in range(0, len(counts), group)]
    return "".join("+" if count >= MANY else str(count) for count in fewest)


def _named(ranked: Ranked) -> Json:
    return {"peer_id": ranked.row.peer.peer_id, "role": ranked.row.peer.role, "heard_s": ranked.row.heard_s}


def _peer_row(ranked: Ranked, now_s: float) -> Json:
    row, said = ranked.row, ranked.row.peer
    return {
        "rank": ranked.rank,
        "peer_id": said.peer_id,
        "role": said.role,
        "endpoint": endpoint_text(said.endpoint),
        "reachability": said.reachability,
        "tokens": row.tokens,
        "tokens_per_s": said.tokens_per_s,
        "queue_tokens": said.queue_tokens,
        "blocks": len(row.replicas),
        "staleness": said.staleness if said.role == "host" else None,
        "exchanged_bytes": said.exchanged_bytes,
        "up_s": max(0.0, now_s - said.started_s) if said.started_s else None,
        "heard_s": row.heard_s,
        "silent": row.is_silent,
        "paused": said.paused,
    }


def _replica_row(snapshot: Snapshot, replica: Replica) -> Json:
    """One of a peer's replicas beside the others of its block."""
    row = snapshot.view.replicas[replica.block]
    return {
        "block": str(replica.block),
        "layer": replica.block.layer,
        "version": replica.version,
        "behind": max(other.version for other in row) - replica.version,
        "divergence": replica.divergence if len(row) > 1 else None,
        "replicas": len(row),
    }


def _block_row(snapshot: Snapshot, block: BlockId) -> Json:
    row = snapshot.view.replicas[block]
    versions = [replica.version for replica in row]
    return {
        "block": str(block),
        "replicas": len(row),
        "hosts": [replica.peer_id for replica in row[:MAX_NAMED]],
        "version_min": min(versions, default=None),
        "version_max": max(versions, default=None),
        "gap": largest_gap([row]),
        "divergence": largest_divergence([row]),
        "queue_tokens": max((replica.queue_tokens for replica in row), default=None),
        "tokens_per_s": sum(replica.tokens_per_s for replica in row),
    }


def _page(rows: Sequence[Any], page: int) -> tuple[Sequence[Any], Json]:
    """The rows of a page, from 1 on, or of the last one there is, and what to say of the rest."""
    pages = max(1, -(-len(rows) // ROWS))
    page = min(max(1, page), pages)
    return rows[(page - 1) * ROWS : page * ROWS], {"total": len(rows), "page": page, "pages": pages}


def _rounded(value: Any) -> Any:  # noqa: ANN401 - whatever JSON can hold
    if isinstance(value, float):
        short = round(value, 1) if abs(value) >= 10 ** (DIGITS - 1) else float(f"{value:.{DIGITS}g}")
        return int(short) if short.is_integer() else short
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return value

"""A swarm as tables for a terminal, from one view of its directory: what `status` prints. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from common.text import KILO, in_byte_units
from coordinator.blocks import block_list_text
from protocol.endpoints import SHOWN_CHARS, endpoint_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import RenderableType

    from dht.view import DirectoryView, PeerInfo, Replica
    from protocol.announcements import ReplicaState
    from protocol.manifest import BlockId, Manifest

MAX_PEERS_SHOWN = 40
MAX_PAUSED_SHOWN = 10
MAX_BLOCKS_CHARS = 300
MANY_REPLICAS = 10


def render_status(manifest: Manifest, view: DirectoryView) -> RenderableType:
    """The run, its peers, its layers, its trainers, and what is on its way or lost."""
    model, averaging = manifest.model, manifest.averaging
    about = (
        f"{model.n_layers} layers of {model.experts_per_layer:,} experts ({model.expert_kind}, "
        f"{model.d_model} to {model.expert_hidden}), {model.experts_per_token} per token by {model.gate}, "
        f"{manifest.codec} on the wire"
    )
    replicas = (
        f"{_count(averaging.target_replicas, 'replica')} of each block wanted; "
        f"exchanges every {averaging.period_s:g} s in {averaging.codec}"
    )
    parts = [_peer_table(view), _layer_table(manifest, view), _trainer_table(view), _last_lines(view)]
    spaced = [item for part in parts if part is not None for item in (Text(), part)]
    return Group(
        Text.assemble("run ", (manifest.run_id, "bold")), Text(about, style="dim"), Text(replicas, style="dim"), *spaced
    )


def largest_gap(rows: Iterable[Sequence[Replica]]) -> int | None:
    """Optimizer steps between the newest and the oldest replica of one block, at most; None if none has two.

    `rows`: the replicas of each block.
    """
    versions = [[replica.version for replica in row] for row in rows if len(row) > 1]
    return max((max(row) - min(row) for row in versions), default=None)


def largest_divergence(rows: Iterable[Sequence[Replica]]) -> float | None:
    """What replicas of blocks that have several differ by, at most; None if no block has two."""
    return max((replica.divergence for row in rows if len(row) > 1 for replica in row), default=None)


def _peer_table(view: DirectoryView) -> RenderableType:
    peers = sorted(view.peers, key=lambda peer: (peer.role, -peer.n_blocks, peer.peer_id))
    if not peers:
        return Text("no peer is announced", style="bold red")
    hosted: dict[str, list[Replica]] = {}
    for replicas in view.replicas.values():
        for replica in replicas:
            hosted.setdefault(replica.peer_id, []).append(replica)
    table = _table(("peer", "left"), ("role", "left"), ("at", "left"), ("blocks", "left"))
    _add_numbers(table, "tokens/s", "queue", "stale", "bytes", "up")
    for peer in peers[:MAX_PEERS_SHOWN]:
        table.add_row(*_peer_row(peer, hosted.get(peer.peer_id, ()), view.taken_s))
    return _with_rest(table, len(peers), "peers")


def _peer_row(peer: PeerInfo, replicas: Sequence[Replica], now_s: float) -> tuple[str | Text, ...]:
    return (
        _short(peer.peer_id),
        peer.role,
        Text(f"{endpoint_text(peer.endpoint)}, not reached", style="bold red")
        if peer.reachability == "not reached"
        else endpoint_text(peer.endpoint) or "-",
        "paused" if peer.paused else block_list_text(replica.block for replica in replicas) or "-",
        f"{peer.tokens_per_s:,.0f}",
        f"{peer.queue_tokens:,}",
        f"{peer.staleness:,.1f}" if peer.role == "host" else "-",
        bytes_text(peer.exchanged_bytes),
        _age(now_s - peer.started_s),
    )


def _layer_table(manifest: Manifest, view: DirectoryView) -> Table:
    table = _table(("layer", "right"), ("live blocks", "right"), ("replicas of each", "left"))
    _add_numbers(table, "joining", "version", "gap", "divergence", "hosts", "queue")
    for layer in range(manifest.model.n_layers):
        rows = [replicas for block, replicas in view.replicas.items() if block.layer == layer]
        joining = sum(block.layer == layer for block in _blocks(view.others, "joining"))
        table.add_row(str(layer), *_layer_row(rows, joining))
    return table


def _layer_row(rows: Sequence[Sequence[Replica]], joining: int) -> tuple[str | Text, ...]:
    replicas = [replica for row in rows for replica in row]
    queues = {replica.peer_id: replica.queue_tokens for replica in replicas}  # a host has one, for all its blocks
    n_live = sum(bool(row) for row in rows)
    return (
        Text(f"{n_live} of {len(rows)}", style="" if n_live == len(rows) else "bold red"),
        _replica_map(rows),
        f"{joining:,}" if joining else "-",
        _range_text([replica.version for replica in replicas]),
        _number(largest_gap(rows)),
        _number(largest_divergence(rows)),
        f"{len(queues):,}",
        f"{sum(queues.values()):,}",
    )


def _trainer_table(view: DirectoryView) -> RenderableType | None:
    """Trainers and their replicas of the trunk; tokens are counted by each for itself."""
    trainers = [peer for peer in view.peers if peer.role == "trainer"]
    if not trainers:
        return None
    trunk = {replica.peer_id: replica for replica in view.trunk}
    table = _table(("trainer", "left"), ("its trunk", "left"))
    _add_numbers(table, "version", "divergence", "own tokens", "run tokens")
    for peer in trainers[:MAX_PEERS_SHOWN]:
        replica = trunk.get(peer.peer_id)
        seen = (replica.state, f"{replica.version:,}", _number(replica.divergence)) if replica else ("-", "-", "-")
        table.add_row(_short(peer.peer_id), *seen, f"{peer.own_tokens:,}", f"{peer.run_tokens:,}")
    return _with_rest(table, len(trainers), "trainers")


def _replica_map(rows: Sequence[Sequence[Replica]]) -> Text:
    """One character per block: its number of replicas that serve."""
    text = Text(overflow="fold")
    for row in rows:
        count = len(row)
        text.append("+" if count >= MANY_REPLICAS else str(count), style="bold red" if count == 0 else "green")
    return text


def _last_lines(view: DirectoryView) -> Text:
    """Why hosts are paused, which blocks are joining or only stored, how far trunks are apart, and what is lost."""
    lines = list(_paused_lines(view))
    told: dict[ReplicaState, str] = {"joining": "being downloaded", "stored": "stored, not served"}
    for state, words in told.items():
        blocks = sorted(set(_blocks(view.others, state)))
        if blocks:
            lines.append(Text(f"{words}: {_names(blocks)}", style="dim"))
    trunk = [replica for replica in view.trunk if replica.state == "serving"]
    gap = largest_gap([trunk])
    if gap is not None:
        lines.append(Text(f"{len(trunk)} replicas of the trunk, {_count(gap, 'step')} apart", style="dim"))
    return Text("\n").join([*lines, _lost_line(view)])


def _paused_lines(view: DirectoryView) -> Iterator[Text]:
    paused = [peer for peer in view.peers if peer.paused and peer.pause_text]
    for peer in paused[:MAX_PAUSED_SHOWN]:
        yield Text(f"paused: {_short(peer.peer_id)} {peer.pause_text}", style="dim")
    if len(paused) > MAX_PAUSED_SHOWN:
        yield Text(f"and {len(paused) - MAX_PAUSED_SHOWN} more hosts are paused", style="dim")


def _lost_line(view: DirectoryView) -> Text:
    lost = view.lost_blocks()
    if not lost:
        return Text(f"all {len(view.replicas)} blocks have a live replica", style="green")
    return Text(f"{len(lost)} of {len(view.replicas)} blocks have no live replica: {_names(lost)}", style="bold red")


def _names(blocks: Iterable[BlockId]) -> str:
    names = block_list_text(blocks)
    return names if len(names) <= MAX_BLOCKS_CHARS else names[:MAX_BLOCKS_CHARS].rpartition(",")[0] + ", ..."


def _blocks(replicas: Iterable[Replica], state: ReplicaState) -> list[BlockId]:
    return [replica.block for replica in replicas if replica.state == state]


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def _add_numbers(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _with_rest(table: Table, count: int, what: str) -> RenderableType:
    rest = count - MAX_PEERS_SHOWN
    return Group(table, Text(f"and {rest} more {what}", style="dim")) if rest > 0 else table


def _short(peer_id: str) -> str:
    return f"…{peer_id[-SHOWN_CHARS:]}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _number(value: float | None) -> str:
    """Whole, or to three digits."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _range_text(values: Sequence[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def bytes_text(n_bytes: float) -> str:
    """One decimal below a hundred, so that a column of them can be compared: 12.3 MB."""
    size, unit = in_byte_units(n_bytes)
    return f"{size:,.0f} {unit}" if unit == "B" or size >= KILO / 10 else f"{size:.1f} {unit}"


def _age(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}h{minutes:02}" if hours else f"{minutes}:{rest:02}"

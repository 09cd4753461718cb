"""A swarm as tables for a terminal, from one view of its directory: what `status` prints. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from common.text import KILO, in_byte_units
from coordinator.blocks import block_list_text, short_block_list_text
from coordinator.figures import largest_gap, layer_figures, peer_figures
from protocol.endpoints import SHOWN_CHARS, endpoint_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import RenderableType

    from coordinator.figures import LayerFigures, PeerFigures
    from dht.view import DirectoryView, Replica
    from protocol.announcements import ReplicaState
    from protocol.manifest import BlockId, Manifest

MAX_PEERS_SHOWN = 40
MAX_PAUSED_SHOWN = 10
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
    layers = _layer_table(layer_figures(manifest, view))
    parts = [_peer_table(view), layers, _trainer_table(view), _last_lines(view)]
    spaced = [item for part in parts if part is not None for item in (Text(), part)]
    return Group(
        Text.assemble("run ", (manifest.run_id, "bold")), Text(about, style="dim"), Text(replicas, style="dim"), *spaced
    )


def _peer_table(view: DirectoryView) -> RenderableType:
    peers = sorted(peer_figures(view), key=lambda row: (row.peer.role, -row.peer.n_blocks, row.peer.peer_id))
    if not peers:
        return Text("no peer is announced", style="bold red")
    table = _table(("peer", "left"), ("role", "left"), ("at", "left"), ("blocks", "left"))
    _add_numbers(table, "tokens/s", "queue", "stale", "bytes", "up")
    for row in peers[:MAX_PEERS_SHOWN]:
        table.add_row(*_peer_row(row, view.taken_s))
    return _with_rest(table, len(peers), "peers")


def _peer_row(row: PeerFigures, now_s: float) -> tuple[str | Text, ...]:
    peer = row.peer
    return (
        _short(peer.peer_id),
        peer.role,
        Text(f"{endpoint_text(peer.endpoint)}, not reached", style="bold red")
        if peer.reachability == "not reached"
        else endpoint_text(peer.endpoint) or "-",
        "paused" if peer.paused else block_list_text(replica.block for replica in row.replicas) or "-",
        f"{peer.tokens_per_s:,.0f}",
        f"{peer.queue_tokens:,}",
        f"{peer.staleness:,.1f}" if peer.role == "host" else "-",
        bytes_text(peer.exchanged_bytes),
        _age(now_s - peer.started_s),
    )


def _layer_table(layers: Sequence[LayerFigures]) -> Table:
    table = _table(("layer", "right"), ("live blocks", "right"), ("replicas of each", "left"))
    _add_numbers(table, "joining", "version", "gap", "divergence", "hosts", "queue")
    for layer in layers:
        table.add_row(str(layer.layer), *_layer_row(layer))
    return table


def _layer_row(layer: LayerFigures) -> tuple[str | Text, ...]:
    n_blocks = len(layer.replicas)
    return (
        Text(f"{layer.live} of {n_blocks}", style="" if layer.live == n_blocks else "bold red"),
        _replica_map(layer.replicas),
        f"{layer.joining:,}" if layer.joining else "-",
        _range_text(layer.version_min, layer.version_max),
        _number(layer.gap),
        _number(layer.divergence),
        f"{layer.hosts:,}",
        f"{layer.queue_tokens:,}",
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


def _replica_map(counts: Iterable[int]) -> Text:
    """One character per block: its number of replicas that serve."""
    text = Text(overflow="fold")
    for count in counts:
        text.append("+" if count >= MANY_REPLICAS else str(count), style="bold red" if count == 0 else "green")
    return text


def _last_lines(view: DirectoryView) -> Text:
    """Why hosts are paused, which blocks are joining or only stored, how far trunks are apart, and what is lost."""
    lines = list(_paused_lines(view))
    told: dict[ReplicaState, str] = {"joining": "being downloaded", "stored": "stored, not served"}
    for state, words in told.items():
        blocks = sorted(set(_blocks(view.others, state)))
        if blocks:
            lines.append(Text(f"{words}: {short_block_list_text(blocks)}", style="dim"))
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
    return Text(
        f"{len(lost)} of {len(view.replicas)} blocks have no live replica: {short_block_list_text(lost)}",
        style="bold red",
    )


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


def _range_text(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return "-"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def bytes_text(n_bytes: float) -> str:
    """One decimal below a hundred, so that a column of them can be compared: 12.3 MB."""
    size, unit = in_byte_units(n_bytes)
    return f"{size:,.0f} {unit}" if unit == "B" or size >= KILO / 10 else f"{size:.1f} {unit}"


def _age(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}h{minutes:02}" if hours else f"{minutes}:{rest:02}"

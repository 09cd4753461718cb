"""`status`: a swarm as its DHT describes it. Asks no host anything, and works while the coordinator is away."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from coordinator.blocks import block_list_text
from dht.directory import Directory
from dht.join import fetch_manifest
from dht.node import DhtConfig, DhtNode
from protocol.errors import UnavailableError
from protocol.identity import Identity
from protocol.swarm_file import resolve

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from rich.console import RenderableType

    from coordinator.config import StatusConfig
    from dht.view import DirectoryView, PeerInfo, Replica
    from protocol.manifest import Manifest

R = TypeVar("R")
SHORT_ID_CHARS = 6
MAX_PEERS_SHOWN = 40
MAX_LOST_CHARS = 300
MANY_REPLICAS = 10


async def run_status(config: StatusConfig, stop: asyncio.Event) -> None:
    """Print the swarm's tables, or JSON. Raises ConfigError; UnavailableError if nobody answers in time."""
    found = await _unless_stopped(_look(config), stop, config.timeout_s)
    if found is None:
        return
    manifest, view = found
    if config.json:
        sys.stdout.write(json.dumps(status_json(manifest, view), indent=2) + "\n")
    else:
        Console().print(render_status(manifest, view))


async def _unless_stopped(work: Coroutine[None, None, R], stop: asyncio.Event, timeout_s: float) -> R | None:
    task = asyncio.create_task(work, name="status")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({task, stopping}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if stop.is_set():
            return None
        raise UnavailableError(f"the swarm did not answer within {timeout_s:g} s; is it up, is its address right?")
    finally:
        task.cancel()
        stopping.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)


async def _look(config: StatusConfig) -> tuple[Manifest, DirectoryView]:
    run_id, initial_peers = resolve(config)
    dht_config = DhtConfig(
        identity=Identity.generate(),
        initial_peers=initial_peers,
        host=config.listen,
        start_timeout_s=config.timeout_s,
    )
    dht = await DhtNode.start(dht_config)
    try:
        manifest = await fetch_manifest(dht, run_id, config.timeout_s)
        directory = Directory(dht, run_id, manifest.model)
        await directory.refresh_now()
        return manifest, directory.snapshot()
    finally:
        await dht.stop()


def status_json(manifest: Manifest, view: DirectoryView) -> dict[str, object]:
    """The swarm as JSON: what the tables show, in full."""
    lost = view.lost_blocks()
    return {
        "run_id": manifest.run_id,
        "manifest": asdict(manifest),
        "blocks": len(view.replicas),
        "blocks_lost": [str(block) for block in lost],
        "peers": [asdict(peer) for peer in view.peers],
        "replicas": [
            {**asdict(replica), "block": str(replica.block)}
            for replicas in view.replicas.values()
            for replica in replicas
        ],
    }


def render_status(manifest: Manifest, view: DirectoryView) -> RenderableType:
    """Tables for a terminal: the run, its peers, its layers, and what is lost."""
    model = manifest.model
    about = (
        f"{model.n_layers} layers of {model.experts_per_layer:,} experts ({model.expert_kind}, "
        f"{model.d_model} to {model.expert_hidden}), {model.experts_per_token} per token by {model.gate}, "
        f"{manifest.codec} on the wire"
    )
    return Group(
        Text.assemble("run ", (manifest.run_id, "bold")),
        Text(about, style="dim"),
        Text(),
        _peer_table(view),
        Text(),
        _layer_table(manifest, view),
        Text(),
        _lost_line(view),
    )


def _peer_table(view: DirectoryView) -> RenderableType:
    peers = sorted(view.peers, key=lambda peer: (peer.role, -peer.n_blocks, peer.peer_id))
    if not peers:
        return Text("no peer is announced", style="bold red")
    hosted: dict[str, list[Replica]] = {}
    for replicas in view.replicas.values():
        for replica in replicas:
            hosted.setdefault(replica.peer_id, []).append(replica)
    table = _table(("peer", "left"), ("role", "left"), ("at", "left"), ("blocks", "left"))
    for name in ("tokens/s", "queue", "up"):
        table.add_column(name, justify="right", no_wrap=True)
    for peer in peers[:MAX_PEERS_SHOWN]:
        table.add_row(*_peer_row(peer, hosted.get(peer.peer_id, ()), view.taken_s))
    rest = len(peers) - MAX_PEERS_SHOWN
    return Group(table, Text(f"and {rest} more peers", style="dim")) if rest > 0 else table


def _peer_row(peer: PeerInfo, replicas: Sequence[Replica], now_s: float) -> tuple[str, ...]:
    blocks = block_list_text(replica.block for replica in replicas)
    return (
        f"…{peer.peer_id[-SHORT_ID_CHARS:]}",
        peer.role,
        peer.endpoint or "-",
        blocks or "-",
        f"{peer.tokens_per_s:,.0f}",
        f"{peer.queue_tokens:,}",
        _age(now_s - peer.started_s),
    )


def _layer_table(manifest: Manifest, view: DirectoryView) -> Table:
    table = _table(("layer", "right"), ("live blocks", "right"), ("replicas of each", "left"))
    for name in ("version", "hosts", "their queue"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in range(manifest.model.n_layers):
        rows = [replicas for block, replicas in view.replicas.items() if block.layer == layer]
        replicas = [replica for row in rows for replica in row]
        queues = {replica.peer_id: replica.queue_tokens for replica in replicas}  # a host has one, for all its blocks
        n_live = sum(bool(row) for row in rows)
        table.add_row(
            str(layer),
            Text(f"{n_live} of {len(rows)}", style="" if n_live == len(rows) else "bold red"),
            _replica_map(rows),
            _range_text([replica.version for replica in replicas]),
            f"{len(queues):,}",
            f"{sum(queues.values()):,}",
        )
    return table


def _replica_map(rows: Sequence[Sequence[Replica]]) -> Text:
    """One character per block: its number of replicas."""
    text = Text(overflow="fold")
    for row in rows:
        count = len(row)
        text.append("+" if count >= MANY_REPLICAS else str(count), style="bold red" if count == 0 else "green")
    return text


def _range_text(values: Sequence[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _lost_line(view: DirectoryView) -> Text:
    lost = view.lost_blocks()
    if not lost:
        return Text(f"all {len(view.replicas)} blocks have a live replica", style="green")
    names = block_list_text(lost)
    names = names if len(names) <= MAX_LOST_CHARS else names[:MAX_LOST_CHARS].rpartition(",")[0] + ", ..."
    return Text(f"{len(lost)} of {len(view.replicas)} blocks have no live replica: {names}", style="bold red")


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def _age(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

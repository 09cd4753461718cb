"""`status`: a swarm as its DHT describes it. Asks no host anything, and works while the coordinator is away."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from common.errors import DrainingError, UnavailableError
from common.tasks import until_stopped
from coordinator.figures import largest_divergence, largest_gap, layer_figures, run_figures
from coordinator.tables import render_status
from dht.addresses import listen_host
from dht.directory import Directory
from dht.join import fetch_manifest
from dht.node import DhtConfig, DhtNode
from dht.swarm_config import resolve
from protocol.identity import Identity

if TYPE_CHECKING:
    from coordinator.config import StatusConfig
    from dht.view import DirectoryView, Replica
    from protocol.manifest import Manifest


async def run_status(config: StatusConfig, stop: asyncio.Event) -> None:
    """Print the swarm's tables, or JSON. Raises ConfigError; UnavailableError if nobody answers in time."""
    try:
        manifest, view = await _found_in_time(config, stop)
    except DrainingError:
        return
    if config.json:
        sys.stdout.write(json.dumps(status_json(manifest, view), indent=2) + "\n")
    else:
        Console().print(render_status(manifest, view))


async def _found_in_time(config: StatusConfig, stop: asyncio.Event) -> tuple[Manifest, DirectoryView]:
    try:
        async with asyncio.timeout(config.timeout_s):
            return await until_stopped(_look(config), stop)
    except TimeoutError:
        waited = f"{config.timeout_s:g} s"
        raise UnavailableError(f"the swarm did not answer within {waited}; is it up, is its address right?") from None


async def _look(config: StatusConfig) -> tuple[Manifest, DirectoryView]:
    admission, initial_peers = resolve(config)
    run_id = admission.run_id
    dht_config = DhtConfig(
        identity=Identity.generate(),
        initial_peers=initial_peers,
        host=await asyncio.to_thread(listen_host, config.listen, initial_peers),
        start_timeout_s=config.timeout_s,
        admission=admission,
    )
    dht = await DhtNode.start(dht_config)
    try:
        manifest = await fetch_manifest(dht, run_id, config.timeout_s)
        directory = Directory(dht, run_id, manifest.model, with_reports=True)
        await directory.refresh_now()
        return manifest, directory.snapshot()
    finally:
        await dht.stop()


def status_json(manifest: Manifest, view: DirectoryView) -> dict[str, object]:
    """The swarm as JSON: what the tables and the run's page show, in full.

    `others` are replicas that are joining, or only stored.
    """
    rows = [*view.replicas.values(), view.trunk]
    layers = layer_figures(manifest, view)
    return {
        "run_id": manifest.run_id,
        "manifest": asdict(manifest),
        "figures": asdict(run_figures(manifest, view, layers)),
        "layers": [asdict(layer) for layer in layers],
        "blocks": len(view.replicas),
        "blocks_lost": [str(block) for block in view.lost_blocks()],
        "version_gap_max": largest_gap(rows) or 0,
        "divergence_max": largest_divergence(rows) or 0.0,
        "peers": [asdict(peer) for peer in view.peers],
        "replicas": [_replica_json(replica) for replicas in view.replicas.values() for replica in replicas],
        "others": [_replica_json(replica) for replica in view.others],
        "trunk": [_replica_json(replica) for replica in view.trunk],
        "reports": [asdict(report) for report in view.reports],
    }


def _replica_json(replica: Replica) -> dict[str, object]:
    return {**asdict(replica), "block": str(replica.block)}

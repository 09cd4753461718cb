"""python -m tests.benchmarks.p2pd_restart --json runs/bench/p2pd_restart.json

How long a node is without its p2pd after `kill -9`, in a swarm of processes: seconds until it listens again, and until
a reader elsewhere in the DHT sees records that the node signed after the kill. All tries kill the same host's.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import tyro

from dht.record_versions import TTL_S
from experiments.live.processes import Node, process_swarm, wait_until
from node.membership.config import SwarmConfig
from node.trainer.swarm_client import SwarmClient
from protocol.manifest import BlockId
from tests.support.leaks import adopt_orphans
from tests.support.swarm_parts import small_manifest

LIMIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tries after one another; the pause lets the first of a row of deaths be the first again."""

    tries: int = 5
    pause_s: float = 12.0
    json: Path | None = None


@dataclass(frozen=True)
class Try:
    """Seconds from the kill."""

    listens_s: float
    announced_s: float


def main() -> None:
    """The command line: see the top of this file."""
    adopt_orphans()
    config = tyro.cli(Config)
    with tempfile.TemporaryDirectory() as folder, process_swarm(Path(folder), small_manifest()) as swarm:
        host = swarm.host("host", "0/0")
        host.wait_for("announced")
        with SwarmClient(SwarmConfig(join=str(swarm.swarm_file))) as client:
            tries = []
            for _ in range(config.tries):
                tries.append(measured(host, client))
                print(tries[-1], flush=True)
                time.sleep(config.pause_s)
    rows = [asdict(one) for one in tries]
    medians = {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}
    print(medians)
    if config.json:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps({"tries": rows, "medians": medians}, indent=1))


def measured(host: Node, client: SwarmClient) -> Try:
    """Kill the p2pd of `host` once."""
    daemon = p2pd_of(host)
    began_s, killed_s = time.monotonic(), time.time()
    os.kill(daemon.pid, signal.SIGKILL)
    wait_until(lambda: listens(host, daemon.pid), "p2pd listens again", LIMIT_S)
    listens_s = time.monotonic() - began_s
    wait_until(lambda: is_fresh(client, killed_s), "the record is back", LIMIT_S)
    return Try(round(listens_s, 2), round(time.monotonic() - began_s, 2))


def p2pd_of(host: Node) -> psutil.Process:
    """The p2pd that runs now."""
    return next(child for child in psutil.Process(host.child.pid).children() if child.name() == "p2pd")


def listens(host: Node, old_pid: int) -> bool:
    """Whether another p2pd than the old one takes connections."""
    for child in psutil.Process(host.child.pid).children():
        if child.name() == "p2pd" and child.pid != old_pid:
            return any(c.status == psutil.CONN_LISTEN for c in child.net_connections(kind="tcp"))
    return False


def is_fresh(client: SwarmClient, killed_s: float) -> bool:
    """Whether the directory has the host's block with an expiration that was signed after the kill."""
    replicas = client.directory.snapshot(with_avoided=True).replicas[BlockId(0, 0)]
    return any(replica.expiration_s > killed_s + TTL_S for replica in replicas)


if __name__ == "__main__":
    main()

"""Calls one host again and again, and tells how each went: for tests that run it in another network namespace.

    python -m tests.support.timed_calls SWARM_FILE PEER_ID SECONDS

A line of JSON for each call: `t` (seconds since 1970), `ms` (null for one that failed), `direct` (no relay), `seen_at`
(where this machine's p2pd sees the host, if they are connected).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import KilohiveError
from node.membership.config import SwarmConfig
from node.trainer.swarm_client import SwarmClient
from protocol import expert_pb2 as pb
from protocol.endpoints import Address, is_relayed
from tests.support.watched_tunnels import watched_tunnels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from node.membership.swarm import Swarm

CALL_TIMEOUT_S = 5.0
PAUSE_S = 0.02


def main() -> None:
    """The command line: see the top of this file."""
    swarm_file, peer_id, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    with watched_tunnels() as is_direct, SwarmClient(SwarmConfig(swarm=swarm_file)) as client:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            sys.stdout.write(json.dumps(_call(client, peer_id, is_direct)) + "\n")
            sys.stdout.flush()
            time.sleep(PAUSE_S)


def _call(client: SwarmClient, peer_id: str, is_direct: Mapping[str, bool]) -> dict[str, Any]:
    swarm: Swarm = client._swarm
    endpoint = next((peer.endpoint for peer in client.directory.peers() if peer.peer_id == peer_id), "")
    request = pb.DescribeRequest(run_id=client.manifest.run_id)
    milliseconds: float | None = None
    if endpoint:
        began = time.perf_counter()
        try:
            client.call(client.client.describe(Address(peer_id, endpoint), request, CALL_TIMEOUT_S), CALL_TIMEOUT_S + 1)
            milliseconds = 1e3 * (time.perf_counter() - began)
        except KilohiveError as error:
            sys.stderr.write(f"{time.time():.1f} {error}\n")
    return {
        "t": time.time(),
        "ms": milliseconds,
        "direct": not is_relayed(endpoint) or is_direct.get(peer_id, False),
        "seen_at": client.call(swarm.dht.streams.seen_at(peer_id, CALL_TIMEOUT_S), CALL_TIMEOUT_S + 1),
    }


if __name__ == "__main__":
    main()

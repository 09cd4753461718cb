"""python -m tests.benchmarks.joining --json runs/bench/joining.json

From the command with an invite to the first call that the new host answers: a coordinator, a host with all 1,024
experts of the default model, a trainer that knows them, and then a host that joins with all of them too. Its start, the
download and the next look of the trainer's directory are in the time. Medians over fresh hosts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro

from experiments.live.processes import ProcessSwarm, process_swarm, wait_until
from node.membership.config import SwarmConfig
from node.model.pairs import Pairs
from node.rpc.expert_codec import encode_inputs
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.swarm_client import SwarmClient
from protocol import expert_pb2 as pb
from protocol.endpoints import Address
from protocol.limits import REQUEST_ID_BYTES
from protocol.manifest import Manifest, all_blocks
from tests.benchmarks.report import Row, RunsConfig, Teller, compare
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.live.processes import Node

MANIFEST = Manifest(name="bench")
LIMIT_S = 10.0
TIMEOUT_S = 60.0
STEPS_BEFORE = 3
TOKENS = 2048
NOTES = (
    "seconds: until the trainer's directory, refreshed every 2 s, had the host, and the host had answered a forward",
    "both hosts hold every block; the download is of weights and moments, the same work that averaging would do",
)


@dataclass(frozen=True, kw_only=True)
class JoiningBenchmark(RunsConfig):
    """Seconds until a host that joins is of use."""


def main(config: JoiningBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    torch.set_num_threads(1)
    tell = Teller()
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
        with tell.busy("starting a coordinator, a host and a client"):
            swarm = stack.enter_context(process_swarm(Path(folder), MANIFEST))
            swarm.start("first", "host", *host_flags(swarm, "first"))
            client = stack.enter_context(SwarmClient(SwarmConfig(swarm=swarm.swarm_file), DispatchConfig()))
            client.wait_for_all_blocks(TIMEOUT_S)
        train(client)
        seconds = [join(swarm, client, f"joiner-{index}", tell) for index in range(config.runs)]
    config.publish("joining", rows_of(seconds), NOTES)


def host_flags(swarm: ProcessSwarm, name: str) -> tuple[str, ...]:
    """With nothing but the invite, and room for every block."""
    invite = (swarm.folder / "invite.txt").read_text().strip()
    capacity = str(len(all_blocks(MANIFEST.model)))
    return ("--join", invite, "--state", str(swarm.folder / name), "--max-blocks", capacity)


def train(client: SwarmClient) -> None:
    """So that what is downloaded is not what the seed gives."""
    layers = [client.moe_layer(layer) for layer in range(MANIFEST.model.n_layers)]
    for _ in range(STEPS_BEFORE):
        x_TD = torch.randn(TOKENS, MANIFEST.model.d_model, requires_grad=True)
        for layer in layers:
            layer(x_TD).square().mean().backward()


def join(swarm: ProcessSwarm, client: SwarmClient, name: str, tell: Teller) -> float:
    """One fresh host, ended afterwards."""
    with tell.busy(f"{name}: joining"):
        started_s = time.monotonic()
        host = swarm.start(name, "host", *host_flags(swarm, name))
        address = seen(client, host)
        client.call(client.client.forward(address, first_call(client.manifest), TIMEOUT_S), TIMEOUT_S)
        seconds = time.monotonic() - started_s
    joined = host.events("joined")
    tell(f"{name}: {seconds:.1f} s, {len(joined)} blocks downloaded")
    host.stop(TIMEOUT_S)
    wait_until(lambda: not holds(client, address), f"{name} has vanished", TIMEOUT_S)
    return seconds


def seen(client: SwarmClient, host: Node) -> Address:
    """The host's address, once the directory has every block of it."""
    told = host.wait_for("announced", TIMEOUT_S)
    address = Address(told["peer_id"], told["endpoint"])
    wait_until(lambda: holds(client, address) == set(all_blocks(MANIFEST.model)), "the joiner is known", TIMEOUT_S)
    return address


def holds(client: SwarmClient, address: Address) -> set[object]:
    """Blocks that a peer serves, as the directory has it."""
    replicas = client.directory.snapshot().replicas
    return {block for block, held in replicas.items() if any(r.peer_id == address.peer_id for r in held)}


def first_call(manifest: Manifest) -> pb.ForwardRequest:
    """One token for one expert."""
    pairs = Pairs(token_P=torch.tensor([0]), expert_P=torch.tensor([0]), weight_P=torch.ones(1))
    return pb.ForwardRequest(
        run_id=manifest.run_id,
        request_id=bytes(REQUEST_ID_BYTES),
        layer=0,
        inputs=encode_inputs(torch.randn(1, manifest.model.d_model), pairs, manifest.codec),
    )


def rows_of(seconds: Sequence[float]) -> list[Row]:
    """Against the limit of the design."""
    experts = MANIFEST.model.n_layers * MANIFEST.model.experts_per_layer
    case = f"{experts:,} experts, from the invite to the first answer"
    return [compare(case, "seconds", seconds, "limit", [LIMIT_S] * len(seconds))]


if __name__ == "__main__":
    try:
        main(tyro.cli(JoiningBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

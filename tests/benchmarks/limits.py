"""python -m tests.benchmarks.limits --json runs/bench/limits.json

A host with limits under more load than they allow: a coordinator, a partner with all blocks that averages with it, and
a client that calls it as fast as it answers; the same with the processor's limit alone, so that it is what binds, and
without limits, to see what the host would take. The run's blocks would fill the memory that it may take. What the host
takes is measured from outside: processor time and memory of its two processes by the system, bytes of calls by a relay
in front of its port, bytes of averaging by its partner.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import tyro

from common.errors import KilohiveError
from experiments.live.processes import process_swarm
from node.membership.config import SwarmConfig
from node.model.pairs import Pairs
from node.rpc.expert_codec import encode_inputs
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.swarm_client import SwarmClient
from protocol import expert_pb2 as pb
from protocol.endpoints import Address
from protocol.limits import REQUEST_ID_BYTES
from protocol.manifest import AveragingConfig, Manifest, ModelConfig
from protocol.tensors import encode
from tests.benchmarks.report import Row, RunsConfig, Teller, compare, not_compared
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.live.processes import Node

MODEL = ModelConfig(
    n_layers=1, d_model=256, expert_hidden=256, experts_per_layer=256, experts_per_block=8, experts_per_token=4
)
MANIFEST = Manifest(name="bench", model=MODEL, codec="int8", averaging=AveragingConfig(target_replicas=2, period_s=2.0))
BLOCKS = f"0/0-{MODEL.blocks_per_layer - 1}"
TOKENS = 1024
CALLERS = 4
WARM_UP_S = 5.0
TIMEOUT_S = 60.0
READY_S = 300.0
"""Blocks that fill the memory take a minute or two to come through a limited connection."""

CALL_TIMEOUT_S = 30.0
CHUNK_BYTES = 65_536
ALL, CPU, NONE = "all limits", "the processor's alone", "no limits"
METRICS = ("memory, MB at most", "processor, % of a core", "sent, MB/s", "received, MB/s")
ANSWERS = "answers a second"
NOTES = (
    f"{CALLERS} callers, each with {TOKENS} tokens to {MODEL.experts_per_token} experts each, again and again",
    "memory: the most of one look a second; the rest: means over the whole time",
    "an answer is a forward and a backward of one request; only runs under all limits are repeated",
)


@dataclass(frozen=True, kw_only=True)
class LimitsBenchmark(RunsConfig):
    """What a limited host takes in a minute under load."""

    seconds: float = 60.0
    """Seconds under load."""
    memory_mb: int = 600
    """Its --max-memory."""
    cpu_percent: float = 20.0
    """Its --max-cpu-percent."""
    rate_mb_s: float = 2.0
    """Its --max-bandwidth-up and --max-bandwidth-down."""


@dataclass
class Relay:
    """Passes bytes between callers and a host, and counts them; `endpoint` once it is open."""

    target: str
    to_host: int = 0
    from_host: int = 0
    endpoint: str = ""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.endpoint = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        if self._server:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def count(self, n_bytes: int, *, up: bool) -> None:
        if up:
            self.from_host += n_bytes
        else:
            self.to_host += n_bytes

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host_reader, host_writer = await asyncio.open_connection(*self.target.rsplit(":", 1))
        pumps = ((reader, host_writer, False), (host_reader, writer, True))
        for source, sink, up in pumps:
            self._tasks.add(asyncio.create_task(self._pump(source, sink, up=up)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, up: bool) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                sink.write(data)
                await sink.drain()
                self.count(len(data), up=up)
        sink.close()


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What was read at one moment."""

    at_s: float
    cpu_s: float
    up_bytes: float
    down_bytes: float


class Observer:
    """Looks at a host from outside."""

    def __init__(self, host: Node, relay: Relay, partner: Node) -> None:
        node = psutil.Process(host.child.pid)
        self._processes = [node, *node.children(recursive=True)]
        self._relay, self._partner = relay, partner

    def look(self) -> Taken:
        times = [process.cpu_times() for process in self._processes]
        # Each way as much as the other: both send their weights.
        exchanged = sum(event["bytes"] for event in self._partner.events("exchange")) / 2
        return Taken(
            at_s=time.monotonic(),
            cpu_s=sum(t.user + t.system for t in times),
            up_bytes=self._relay.from_host + exchanged,
            down_bytes=self._relay.to_host + exchanged,
        )

    def memory(self) -> int:
        return sum(process.memory_full_info().pss for process in self._processes)


def main(config: LimitsBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    torch.set_num_threads(1)
    tell = Teller()
    found = {
        ALL: [measure(config, limit_flags(config), tell) for _ in range(config.runs)],
        CPU: [measure(config, cpu_flags(config), tell)],
        NONE: [measure(config, (), tell)],
    }
    config.publish("limits", rows_of(config, found), NOTES)


def measure(config: LimitsBenchmark, limits: Sequence[str], tell: Teller) -> dict[str, float]:
    """What a fresh host takes of its machine in a minute."""
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
        with tell.busy("starting a coordinator, two hosts and a client"):
            swarm = stack.enter_context(process_swarm(Path(folder), MANIFEST))
            partner = swarm.host("partner", BLOCKS)
            partner.wait_for("announced", TIMEOUT_S)
            place = ("--join", str(swarm.swarm_file), "--state", str(swarm.folder / "guest"))
            capacity = ("--max-blocks", str(MODEL.blocks_per_layer), "--set", "recheck_s=0")
            guest = swarm.start("guest", "host", *place, *capacity, *limits)
            announced = guest.wait_for("announced", READY_S)
            client = stack.enter_context(SwarmClient(SwarmConfig(swarm=swarm.swarm_file), DispatchConfig()))
        relay = Relay(announced["endpoint"])
        client.call(relay.open(), TIMEOUT_S)
        stack.callback(lambda: client.call(relay.close(), TIMEOUT_S))
        load = Load(client, Address(announced["peer_id"], relay.endpoint), list(announced["versions"]))
        tell(f"{len(announced['versions'])} of {MODEL.blocks_per_layer} blocks; {' '.join(limits) or 'no limits'}")
        with tell.busy(f"{config.seconds:.0f} s under load"):
            figures = client.call(
                under_load(config, load, Observer(guest, relay, partner)), config.seconds + 2 * TIMEOUT_S
            )
    tell(", ".join(f"{metric} {value:.1f}" for metric, value in figures.items()))
    return figures


def cpu_flags(config: LimitsBenchmark) -> tuple[str, ...]:
    """So that it is what binds."""
    return ("--max-cpu-percent", f"{config.cpu_percent:g}")


def limit_flags(config: LimitsBenchmark) -> tuple[str, ...]:
    rate = f"{config.rate_mb_s:g}MB/s"
    return (
        *cpu_flags(config), "--max-memory", f"{config.memory_mb}MB",
        "--max-bandwidth-up", rate, "--max-bandwidth-down", rate,
    )  # fmt: skip


class Load:
    """Forward and backward, again and again."""

    def __init__(self, client: SwarmClient, address: Address, blocks: Sequence[str]) -> None:
        self._client, self._address, self._manifest = client.client, address, client.manifest
        generator = torch.Generator().manual_seed(0)
        model = self._manifest.model
        x_TD = torch.randn(TOKENS, model.d_model, generator=generator)
        experts = torch.tensor([expert for name in blocks for expert in model.block_experts(int(name[2:]))])
        n_pairs = TOKENS * model.experts_per_token
        pairs = Pairs(
            token_P=torch.arange(TOKENS).repeat_interleave(model.experts_per_token),
            expert_P=experts[torch.randint(0, len(experts), (n_pairs,), generator=generator)],
            weight_P=torch.full((n_pairs,), 1 / model.experts_per_token),
        )
        self._inputs = encode_inputs(x_TD, pairs, self._manifest.codec)
        self._grad = encode(x_TD, self._manifest.codec)
        self.answered, self.refused = 0, 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._once()
            except KilohiveError:
                self.refused += 1
                await asyncio.sleep(0.1)

    async def _once(self) -> None:
        run_id, request_id = self._manifest.run_id, os.urandom(REQUEST_ID_BYTES)
        forward = pb.ForwardRequest(
            run_id=run_id, request_id=request_id, layer=0, inputs=self._inputs, keep_inputs=True
        )
        answer = await self._client.forward(self._address, forward, CALL_TIMEOUT_S)
        backward = pb.BackwardRequest(
            run_id=run_id, request_id=request_id, layer=0, grad_combined_TD=self._grad, version=answer.version
        )
        await self._client.backward(self._address, backward, CALL_TIMEOUT_S)
        self.answered += 1


async def under_load(config: LimitsBenchmark, load: Load, observer: Observer) -> dict[str, float]:
    """Percent of each limit, and answers."""
    callers = [asyncio.create_task(load.run()) for _ in range(CALLERS)]
    try:
        await asyncio.sleep(WARM_UP_S)
        before, memory, answered = observer.look(), list[int](), load.answered
        while time.monotonic() < before.at_s + config.seconds:
            await asyncio.sleep(1.0)
            memory.append(observer.memory())
        after = observer.look()
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    seconds = after.at_s - before.at_s
    taken = (
        max(memory) / 1e6,
        (after.cpu_s - before.cpu_s) / seconds * 100,
        (after.up_bytes - before.up_bytes) / seconds / 1e6,
        (after.down_bytes - before.down_bytes) / seconds / 1e6,
    )
    return {**dict(zip(METRICS, taken, strict=True)), ANSWERS: (load.answered - answered) / seconds}


def rows_of(config: LimitsBenchmark, found: Mapping[str, Sequence[dict[str, float]]]) -> list[Row]:
    """What was taken, beside the limit where there was one; and what was left for trainers."""
    limits = dict(zip(METRICS, (config.memory_mb, config.cpu_percent, config.rate_mb_s, config.rate_mb_s), strict=True))
    held = {ALL: METRICS, CPU: METRICS[1:2], NONE: ()}
    return [
        compare(case, metric, values, "limit", [float(limits[metric])] * len(runs))
        if metric in held[case]
        else not_compared(case, metric, values, "limit", "")
        for case, runs in found.items()
        for metric in runs[0]
        for values in [[one[metric] for one in runs]]
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(LimitsBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

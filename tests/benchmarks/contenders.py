"""The three that `dispatch.py` lets take turns: a swarm of processes, one process, hivemind. Figures are tokens/s.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from experiments.live.processes import process_swarm
from node.membership.config import SwarmConfig
from node.model.moe import LocalExperts, LocalMoE
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.swarm_client import SwarmClient
from protocol.manifest import Manifest, ModelConfig, OptimizerConfig
from tests.benchmarks.line_peer import LinePeer, NoAnswerError
from tests.benchmarks.meters import cpu_seconds, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from node.model.moe import MoE
    from protocol.manifest import Codec, GateKind

START_TIMEOUT_S = 120.0
STEP_TIMEOUT_S = 180.0
TRAINER_THREADS = 1
"""Of the swarm's trainer; its hosts have one each too."""
LAYER = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size. A run is `steps` steps, enough for about a second; hivemind's is one step."""

    key: str
    experts: int
    d_model: int
    hidden: int
    tokens: int
    hosts: tuple[int, ...]
    steps: int
    experts_per_token: int = 4
    experts_per_block: int = 32
    gate: GateKind = "topk"
    codec: Codec = "fp32"
    peer_limit_s: float | None = None
    """For hivemind's step where it takes minutes: it takes one, is ended after so long, and does not take turns."""

    @property
    def run_tokens(self) -> int:
        """Of one run."""
        return self.steps * self.tokens

    def name(self, hosts: int) -> str:
        """As it stands in the rows."""
        size = f"{self.experts}x{self.d_model}x{self.hidden}, K={self.experts_per_token}"
        return f"{size}, {self.tokens} tokens, {hosts} host{'s' if hosts > 1 else ''}, {self.codec}"

    def manifest(self) -> Manifest:
        """One layer, no warm-up; fp32 on the wire, as hivemind has it, unless the case says otherwise."""
        model = ModelConfig(
            d_model=self.d_model,
            n_layers=1,
            expert_hidden=self.hidden,
            experts_per_layer=self.experts,
            experts_per_token=self.experts_per_token,
            experts_per_block=self.experts_per_block,
            gate=self.gate,
        )
        optimizer = OptimizerConfig(warmup_tokens=0, total_tokens=10**9)
        return Manifest(name="bench", codec=self.codec, model=model, optimizer=optimizer)


class LayerRun:
    """Times steps of one MoE layer: forward, backward to tokens and gate; the experts step inside the backward."""

    def __init__(self, layer: MoE, case: Case, threads: int) -> None:
        self._layer, self._case, self._threads = layer, case, threads
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self) -> float:
        """Tokens per second over one run of fresh tokens."""
        case = self._case
        shape = (2 * case.steps, case.tokens, case.d_model)
        rows_STD = torch.randn(shape, generator=self._generator)
        with _threads(self._threads):
            started = time.perf_counter()
            for step in range(case.steps):
                self._step(rows_STD[2 * step], rows_STD[2 * step + 1])
            return case.run_tokens / (time.perf_counter() - started)

    def _step(self, x_TD: torch.Tensor, grad_TD: torch.Tensor) -> None:
        x_TD.requires_grad_()
        self._layer(x_TD).backward(grad_TD)
        self._layer.zero_grad()
        self._layer.balance()


class Metered:
    """A run that also tells the processor time that this process and `hosts` (pids, with all below them) took for it.

    `cpu_us` per token, one for each call.
    """

    def __init__(self, run: Callable[[], float], case: Case, hosts: Sequence[int] = ()) -> None:
        self._run, self._tokens, self._hosts = run, case.run_tokens, hosts
        self.cpu_us: list[float] = []

    def __call__(self) -> float:
        """Tokens per second."""
        before_s = self._cpu_s()
        figure = self._run()
        self.cpu_us.append(1e6 * (self._cpu_s() - before_s) / self._tokens)
        return figure

    def _cpu_s(self) -> float:
        # Of this process alone: below it are the hosts, the coordinator, and whoever else takes turns.
        return cpu_seconds([psutil.Process(), *(process for pid in self._hosts for process in tree(pid))])


@contextlib.contextmanager
def ours(case: Case, hosts: int, folder: Path) -> Iterator[Metered]:
    """A coordinator, `hosts` hosts and a client that are up and know each other."""
    manifest = case.manifest()
    with process_swarm(folder, manifest) as swarm:
        parts = enumerate(shares(manifest.model.blocks_per_layer, hosts))
        pids = [swarm.host(f"host-{index}", blocks).child.pid for index, blocks in parts]
        with SwarmClient(SwarmConfig(swarm=swarm.swarm_file), DispatchConfig(call_timeout_s=60)) as client:
            client.wait_for_all_blocks(START_TIMEOUT_S)
            run = LayerRun(client.moe_layer(LAYER), case, TRAINER_THREADS)

            def checked() -> float:
                figure = run()
                if client.dispatcher.calls_failed:
                    raise RuntimeError(f"{client.dispatcher.calls_failed} calls failed: the figure would be a lie")
                return figure

            yield Metered(checked, case, pids)


def shares(n_blocks: int, hosts: int) -> list[str]:
    """Blocks of each host, as `--blocks` takes them; every host has at least one."""
    edges = [n_blocks * index // hosts for index in range(hosts + 1)]
    return [f"{LAYER}/{start}-{stop - 1}" for start, stop in itertools.pairwise(edges)]


def local(case: Case, threads: int) -> Metered:
    """The same layer in this process."""
    manifest = case.manifest()
    layer = LocalMoE(LocalExperts(manifest), LAYER, torch.Generator().manual_seed(manifest.seed))
    return Metered(LayerRun(layer, case, threads), case)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def theirs(case: Case, log: Path) -> Iterator[Callable[[], float]]:
    """hivemind in its own process, up and declared; see `LinePeer`."""
    arguments = {
        "--experts": case.experts,
        "--d-model": case.d_model,
        "--tokens": case.tokens,
        "--experts-per-token": case.experts_per_token,
    }
    peer = LinePeer("tests.benchmarks.hivemind_peer", arguments, log)

    def run() -> float:
        peer.tell("run")
        return case.tokens / float(peer.answer(case.peer_limit_s or STEP_TIMEOUT_S))

    try:
        peer.answer(START_TIMEOUT_S)
        yield run
    finally:
        peer.close()


def one_step_of_theirs(case: Case, log: Path) -> tuple[float, str]:
    """hivemind's tokens/s over its first step, and how to read it; if it takes too long, more than it can have had."""
    limit_s = case.peer_limit_s or STEP_TIMEOUT_S
    try:
        with theirs(case, log) as run:
            return run(), "one step, its first"
    except NoAnswerError:
        return case.tokens / limit_s, f"did not end its first step in {limit_s:.0f} s, it is slower than this"

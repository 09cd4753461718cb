"""python -m tests.benchmarks.hivemind_workload serve --experts 4 --d-model 512 --rows 1024

hivemind's side of `workload.py`: its server of feed-forward experts and one client of it, a process of its own each.
`serve` prints its peer id and addresses, then waits for its input to end. `call` prints `ready`; for each line `run`
that it reads it sends batches to experts drawn at random, forward and backward, and prints `done`.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import torch
import tyro
from hivemind.moe.client.expert import RemoteExpert
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.moe.expert_uid import ExpertInfo
from hivemind.moe.server import background_server
from hivemind.p2p import P2P, PeerID

from tests.benchmarks.peer_process import end_descendants, private_stdout
from tests.support.leaks import adopt_orphans

PREFIX = "expert."


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Host experts, hivemind's "ffn": four times as wide as the model."""

    experts: int
    d_model: int
    rows: int
    """Of one call; hivemind's benchmark lets a server put four of them together."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """Call the experts of a server."""

    peer_id: str
    addresses: str
    """Parted by commas."""
    experts: int
    d_model: int
    rows: int
    batches: int
    """Of each line `run`."""
    seed: int = 0
    """Of the data and of which expert comes when."""


def serve(config: Serve) -> None:
    """Until standard input ends."""
    answers = private_stdout()
    try:
        with background_server(
            expert_cls="ffn",
            expert_uids=[f"{PREFIX}{index}" for index in range(config.experts)],
            hidden_dim=config.d_model,
            optim_cls=torch.optim.Adam,
            device="cpu",
            num_handlers=1,
            max_batch_size=4 * config.rows,
        ) as info:
            answers.write(f"{info.peer_id} {','.join(map(str, info.addrs))}\n")
            sys.stdin.read()
    finally:
        end_descendants()


def call(config: Call) -> None:
    """Serve `run` lines until standard input ends."""
    answers = private_stdout()
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    try:
        p2p = RemoteExpertWorker.run_coroutine(P2P.create(initial_peers=config.addresses.split(",")))
        peer_id = PeerID.from_base58(config.peer_id)
        infos = [ExpertInfo(uid=f"{PREFIX}{index}", peer_id=peer_id) for index in range(config.experts)]
        experts = [RemoteExpert(expert_info=info, p2p=p2p) for info in infos]
        answers.write("ready\n")
        for _ in sys.stdin:
            for _ in range(config.batches):
                pass_through(rng.choice(experts), config)
            answers.write("done\n")
    finally:
        end_descendants()


def pass_through(expert: torch.nn.Module, config: Call) -> None:
    """Forward and backward of one batch."""
    x_TD = torch.randn(config.rows, config.d_model, requires_grad=True)
    expert(x_TD).sum().backward()
    if x_TD.grad is None or not bool(x_TD.grad.isfinite().all()):
        raise SystemExit("hivemind gave no gradient")


if __name__ == "__main__":
    adopt_orphans()
    config = tyro.cli(Serve | Call)
    serve(config) if isinstance(config, Serve) else call(config)

"""python -m tests.benchmarks.hivemind_peer --experts 64 --d-model 64 --tokens 256 --experts-per-token 4

hivemind's own mixture of experts, for `dispatch.py` to compare with, in a process of its own: its DHT, server and
experts fork, which gRPC does not survive. Prints `ready` once the experts are declared; for each line `run` that it
reads it takes one step over fresh tokens (forward, backward; hivemind's server steps an expert on each backward) and
prints the seconds. It leaves when its input ends, with every process that it started.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hivemind
import torch
import tyro
from hivemind.moe import RemoteMixtureOfExperts
from hivemind.moe.server import background_server

from tests.benchmarks.peer_process import end_descendants, private_stdout
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

PREFIX = "expert."
DECLARE_TIMEOUT_S = 60.0
POLL_S = 0.25
N_HANDLERS = 4
"""More make no difference (docs); the default is 8 processes for each expert."""


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """Experts are hivemind's "ffn", whose hidden width is four times the model's."""

    experts: int
    """A square number: hivemind numbers them on a grid."""
    d_model: int
    tokens: int
    """Tokens per step."""
    experts_per_token: int
    seed: int = 0
    """Of gate and tokens."""

    @property
    def side(self) -> int:
        """Length of the grid's side."""
        return math.isqrt(self.experts)


def main(config: PeerConfig) -> None:
    """Serve `run` lines until standard input ends."""
    if config.side**2 != config.experts:
        raise SystemExit(f"--experts: must be a square number, is {config.experts}")
    adopt_orphans()
    answers = private_stdout()
    try:
        with _server(config) as addresses, _dht(addresses) as dht:
            _wait_until_declared(dht, config.side)
            _serve(config, dht, answers)
    finally:
        end_descendants()


@contextlib.contextmanager
def _server(config: PeerConfig) -> Iterator[list[Any]]:
    uids = [f"{PREFIX}{row}.{column}" for row in range(config.side) for column in range(config.side)]
    with background_server(
        expert_cls="ffn",
        expert_uids=uids,
        hidden_dim=config.d_model,
        optim_cls=torch.optim.Adam,
        device="cpu",
        num_handlers=N_HANDLERS,
        max_batch_size=16_384,
    ) as info:
        yield info.addrs


@contextlib.contextmanager
def _dht(initial_peers: list[Any]) -> Iterator[hivemind.DHT]:
    dht = hivemind.DHT(start=True, initial_peers=initial_peers)
    # uvloop made the pipe into the DHT's process non-blocking, and a message that has not wholly arrived when it is
    # read ends that process with EAGAIN (hivemind pull request 660, open): with two busy cores it does at 64 experts.
    # The pipe's flags are shared over the fork, so they can be mended from here.
    os.set_blocking(dht._inner_pipe.fileno(), True)
    try:
        yield dht
    finally:
        dht.shutdown()


def _wait_until_declared(dht: hivemind.DHT, side: int) -> None:
    deadline = time.monotonic() + DECLARE_TIMEOUT_S
    missing = set(range(side))
    while missing:
        for row in sorted(missing):
            found = dht.get(f"{PREFIX}{row}.", latest=True)
            if found is not None and len(found.value) >= side:
                missing.discard(row)
        if missing and time.monotonic() > deadline:
            raise SystemExit(f"hivemind did not declare rows {sorted(missing)} within {DECLARE_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)


def _serve(config: PeerConfig, dht: hivemind.DHT, answers: TextIO) -> None:
    torch.manual_seed(config.seed)
    layer = RemoteMixtureOfExperts(
        in_features=config.d_model,
        grid_size=(config.side, config.side),
        dht=dht,
        uid_prefix=PREFIX,
        k_best=config.experts_per_token,
    )
    answers.write("ready\n")
    for line in sys.stdin:
        if line.strip() != "run":
            raise SystemExit(f"unknown command: {line.strip()!r}")
        answers.write(f"{_step_seconds(layer, config)}\n")


def _step_seconds(layer: torch.nn.Module, config: PeerConfig) -> float:
    x_TD = torch.randn(config.tokens, config.d_model, requires_grad=True)
    grad_TD = torch.randn(config.tokens, config.d_model)
    started = time.perf_counter()
    layer(x_TD).backward(grad_TD)
    seconds = time.perf_counter() - started
    layer.zero_grad()
    # By default hivemind leaves out the experts that fail; a token without any would make its figure a lie.
    if x_TD.grad is None or not bool(x_TD.grad.any(dim=1).all()):
        raise SystemExit("hivemind gave no gradient for some tokens")
    return seconds


if __name__ == "__main__":
    main(tyro.cli(PeerConfig))

"""python -m tests.benchmarks.workload_client --swarm runs/local/swarm.toml --rows 1024 --batches 4

Our side of `workload.py`: one client of a swarm, in a process of its own. Prints `ready`; for each line `run` that it
reads it sends batches to experts of layer 0 drawn at random, forward and backward, and prints `done`.

Shapes: T tokens, D model width, K experts per token (one), E experts of the layer.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - tyro reads the annotation

import torch
import tyro
from torch import nn

from common.allocator import keep_freed_memory
from node.membership.config import SwarmConfig
from node.model.gate.base import GateOutput
from node.model.moe import MoE
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.swarm_client import SwarmClient
from tests.benchmarks.peer_process import private_stdout

START_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Call the experts of a swarm."""

    swarm: Path
    """How to join it."""
    rows: int
    """Of one call."""
    batches: int
    """Of each line `run`."""
    seed: int = 0
    """Of the data and of which expert comes when."""


class OneExpert(nn.Module):
    """A gate that sends every token to `chosen`."""

    chosen = 0

    def forward(self, x_TD: torch.Tensor, live_E: torch.Tensor) -> GateOutput:
        """All tokens to one expert, with weight 1."""
        ids_TK = torch.full((len(x_TD), 1), self.chosen)
        load_E = torch.zeros(len(live_E), dtype=torch.int64)
        return GateOutput(expert_ids_TK=ids_TK, weights_TK=torch.ones(ids_TK.shape), load_E=load_E, overflow=0)


def main(config: ClientConfig) -> None:
    """Serve `run` lines until standard input ends."""
    answers = private_stdout()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    with SwarmClient(SwarmConfig(swarm=config.swarm), DispatchConfig(call_timeout_s=START_TIMEOUT_S)) as client:
        client.wait_for_all_blocks(START_TIMEOUT_S)
        gate, model = OneExpert(), client.manifest.model
        layer = MoE(gate, client.dispatcher, 0)  # type: ignore[arg-type]
        answers.write("ready\n")
        for _ in sys.stdin:
            for _ in range(config.batches):
                gate.chosen = rng.randrange(model.experts_per_layer)
                pass_through(layer, config.rows, model.d_model)
            if client.dispatcher.calls_failed:
                raise SystemExit(f"{client.dispatcher.calls_failed} calls failed: the figure would be a lie")
            answers.write("done\n")


def pass_through(layer: MoE, rows: int, d_model: int) -> None:
    """Forward and backward of one batch."""
    x_TD = torch.randn(rows, d_model, requires_grad=True)
    layer(x_TD).sum().backward()
    if x_TD.grad is None or not bool(x_TD.grad.isfinite().all()):
        raise SystemExit("the swarm gave no gradient")


if __name__ == "__main__":
    main(tyro.cli(ClientConfig))

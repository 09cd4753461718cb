"""python -m tests.benchmarks.kernels --json runs/bench/kernels.json

What many small experts cost a host: forward, and backward with the optimizer's step, of one layer's blocks in one
thread, against one dense feed-forward network of the same D and H over as many rows, which does the same
multiplications and additions; and both passes of a layer of `granularity` against memory alone, which moves the weights
and moments that a step cannot do without. Medians of runs that take turns.

Shapes: T tokens, P pairs, D model width, H expert width.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import tyro
from torch import nn

from common.allocator import keep_all_memory, keep_freed_memory
from node.model.experts.layer import layer_backward, layer_forward
from node.model.moe import LocalExperts
from node.model.pairs import Pairs
from tests.benchmarks.contenders import LAYER, Case
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LR = 1e-3
FORWARD, BACKWARD = "forward, tokens/s", "backward and step, tokens/s"
BOTH = "forward, backward and step, tokens/s"
APART = f"{BOTH}, of experts that have taken different numbers of steps"
OURS, DENSE, MEMORY = "blocks of experts", "one dense FFN", "memory alone"

PASSES = 7
"""How often a step moves each weight or one of its moments: the weight is read twice and written once, each of the two
moments read and written once. Gradients need not leave the cache."""
CASES = (
    Case(key="small", experts=64, d_model=64, hidden=256, tokens=256, hosts=(), steps=20),
    Case(key="default", experts=512, d_model=128, hidden=32, tokens=1024, hosts=(), steps=10),
    Case(key="large", experts=1024, d_model=128, hidden=128, tokens=4096, hosts=(), steps=2),
    Case(key="tiny", experts=16_384, d_model=64, hidden=8, tokens=4096, hosts=(), steps=4, experts_per_block=512),
)
GRANULARITY = tuple(
    Case(
        key=str(experts),
        experts=experts,
        d_model=128,
        hidden=32,
        tokens=2048,
        hosts=(),
        steps=4,
        experts_per_block=experts,
        experts_per_token=8,
    )
    for experts in (529, 2025, 8281)
)
NOTES = (
    "1 thread; every expert is as likely as any other; rows of the dense network: tokens x K",
    "the dense network has one set of weights to step where the experts have as many as there are experts",
)


@dataclass(frozen=True, kw_only=True)
class KernelsBenchmark(RunsConfig):
    """Speed of the experts' arithmetic."""


def main(config: KernelsBenchmark) -> None:
    """Measure, write, print."""
    torch.set_num_threads(1)
    keep_freed_memory()
    tell, rows = Teller(), list[Row]()
    for case in CASES:
        sparse, dense = Sparse(case), Dense(case)
        for metric, ours, theirs in (
            (FORWARD, sparse.forward, dense.forward),
            (BACKWARD, sparse.backward, dense.backward),
        ):
            figures = alternate({OURS: timed(ours, case), DENSE: timed(theirs, case)}, config.runs, tell)
            rows.append(row_of(case, metric, figures, DENSE))
    keep_all_memory()  # as a trial's process does
    for case in GRANULARITY:
        both, memory = Sparse(case).both, Memory(case).move
        figures = alternate({OURS: timed(both, case), MEMORY: timed(memory, case)}, config.runs, tell)
        rows.append(row_of(case, BOTH, figures, MEMORY))
    case = GRANULARITY[-1]
    apart, memory = Sparse(case), Memory(case).move
    apart.step_apart()
    figures = alternate({OURS: timed(apart.both, case), MEMORY: timed(memory, case)}, config.runs, tell)
    rows.append(row_of(case, APART, figures, MEMORY))
    config.publish("kernels", rows, NOTES)


def row_of(case: Case, metric: str, figures: Mapping[str, Sequence[float]], against: str) -> Row:
    """Ours against the dense network, or against memory."""
    size = f"{case.experts:,} experts, {case.d_model}x{case.hidden}, K={case.experts_per_token}"
    return compare(f"{size}, {case.tokens:,} tokens", metric, figures[OURS], against, figures[against])


def timed(function: Callable[[], object], case: Case) -> Callable[[], float]:
    """Tokens per second over a case's steps."""

    def run() -> float:
        started = time.perf_counter()
        for _ in range(case.steps):
            function()
        return case.run_tokens / (time.perf_counter() - started)

    return run


class Sparse:
    """A layer's blocks, as a host runs them."""

    def __init__(self, case: Case) -> None:
        manifest = case.manifest()
        generator = torch.Generator().manual_seed(0)
        n_pairs = case.tokens * case.experts_per_token
        self._optimizer = manifest.optimizer
        self._blocks = LocalExperts(manifest).blocks[LAYER]
        self._x_TD, self._grad_TD = torch.randn(2, case.tokens, case.d_model, generator=generator)
        self._pairs = Pairs(
            token_P=torch.arange(case.tokens).repeat_interleave(case.experts_per_token),
            expert_P=torch.randint(case.experts, (n_pairs,), generator=generator),
            weight_P=torch.full((n_pairs,), 1 / case.experts_per_token),
        )

    def forward(self) -> None:
        """Weighted sums of all tokens."""
        layer_forward(self._blocks, self._x_TD, self._pairs)

    def backward(self) -> None:
        """All gradients; every touched expert steps."""
        layer_backward(
            self._blocks,
            self._x_TD,
            self._pairs,
            self._grad_TD,
            lambda block, own: block.step(own, LR, self._optimizer),
        )

    def step_apart(self) -> None:
        """Have the experts take different numbers of steps, as early in a training."""
        for block in self._blocks:
            generator = torch.Generator().manual_seed(1)
            block.adam.steps_E.copy_(torch.randint(20, block.adam.steps_E.shape, generator=generator))

    def both(self) -> None:
        """A step of the layer."""
        self.forward()
        self.backward()


class Memory:
    """As many bytes moved as a step of a layer must, if every expert is touched: read, and written elsewhere."""

    def __init__(self, case: Case) -> None:
        n_weights = case.experts * 2 * case.d_model * case.hidden
        self._from, self._to = torch.zeros(2, n_weights * PASSES // 2)

    def move(self) -> None:
        """Read one half and write the other."""
        self._to.copy_(self._from)


class Dense:
    """The same arithmetic without a choice, as torch has it. Like a host's, its backward computes the forward again."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        width, hidden, rows = case.d_model, case.hidden, case.tokens * case.experts_per_token
        self._layer = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
        )
        self._adam = torch.optim.AdamW(self._layer.parameters(), lr=LR, fused=True)
        self._x_PD, self._grad_PD = torch.randn(2, rows, width, generator=generator)
        self._x_PD.requires_grad_()

    @torch.no_grad()
    def forward(self) -> None:
        """Outputs of as many rows as there are pairs."""
        self._layer(self._x_PD)

    def backward(self) -> None:
        """All gradients, and one step."""
        self._layer(self._x_PD).backward(self._grad_PD)
        self._adam.step()
        self._adam.zero_grad()
        self._x_PD.grad = None


if __name__ == "__main__":
    try:
        main(tyro.cli(KernelsBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

"""Jobs for a runtime, by number, and a way to let them pile up: what tests of the runtime share."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from node.host.serving.activation_cache import CheckedInputs, RequestKey
from node.host.serving.jobs import BackwardJob, ForwardJob
from node.host.serving.runtime import Runtime, RuntimeConfig
from node.model.experts.block import new_block
from node.model.experts.layer import layer_backward
from node.model.learning_rate import learning_rate_factor
from node.model.pairs import Pairs
from protocol.manifest import BlockId, all_blocks
from tests.support.swarm_parts import CPU, small_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.model.experts.block import Block
    from protocol.manifest import Manifest

MANIFEST = small_manifest(dtype="fp64")
NEVER = float("inf")
TIMEOUT_S = 10.0
N_TOKENS = 6


def inputs(seed: int, n_tokens: int = N_TOKENS, layer: int = 0, experts: Sequence[int] = range(16)) -> CheckedInputs:
    """Random tokens, each with two of `experts`."""
    generator = torch.Generator().manual_seed(seed)
    chosen_P = torch.randint(0, len(experts), (2 * n_tokens,), generator=generator)
    expert_P = torch.tensor(list(experts))[chosen_P]
    per_block = MANIFEST.model.experts_per_block
    return CheckedInputs(
        x_TD=torch.randn(n_tokens, 16, dtype=torch.float64, generator=generator),
        pairs=Pairs(
            token_P=torch.arange(n_tokens).repeat_interleave(2),
            expert_P=expert_P,
            weight_P=torch.rand(2 * n_tokens, dtype=torch.float64, generator=generator),
        ),
        blocks=frozenset(BlockId(layer, expert // per_block) for expert in expert_P.tolist()),
    )


def key(number: int, layer: int = 0) -> RequestKey:
    return RequestKey(layer, number.to_bytes(16, "big"))


def forward(
    number: int,
    *,
    keep: bool = True,
    deadline: float = NEVER,
    layer: int = 0,
    experts: Sequence[int] = range(16),
    n_tokens: int = N_TOKENS,
) -> ForwardJob:
    taken = inputs(number, n_tokens, layer, experts)
    return ForwardJob(key=key(number, layer), inputs=taken, keep=keep, deadline=deadline)


def backward(
    number: int,
    *,
    resend: bool = False,
    deadline: float = NEVER,
    version: int = 0,
    no_step: bool = False,
    experts: Sequence[int] = range(16),
) -> BackwardJob:
    grad_TD = torch.randn(N_TOKENS, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + number))
    return BackwardJob(
        key=key(number),
        grad_TD=grad_TD,
        inputs=inputs(number, experts=experts) if resend else None,
        run_tokens=0,
        deadline=deadline,
        version=version,
        no_step=no_step,
    )


def make_runtime(config: RuntimeConfig | None = None, manifest: Manifest = MANIFEST) -> Runtime:
    """Over every block of the grid, as they are before training; not started."""
    blocks = [new_block(manifest, block, CPU) for block in all_blocks(manifest.model)]
    return Runtime(blocks, manifest, config or RuntimeConfig())


def step_alone(block: Block, job: BackwardJob, manifest: Manifest, rate_scale: float = 1.0) -> None:
    """Step `block` for one request that sent its inputs, with no runtime about."""
    if job.inputs is None:
        raise ValueError("the request did not send its inputs")
    optimizer = manifest.optimizer
    lr = optimizer.expert_lr * learning_rate_factor(optimizer, job.run_tokens) * rate_scale
    layer_backward(
        [block],
        job.inputs.x_TD,
        job.inputs.pairs,
        job.grad_TD,
        lambda touched, gradients: touched.step(gradients, lr, optimizer),
    )


class Held:
    """Keeps the runtime's thread busy, so that jobs pile up behind it."""

    def __init__(self, runtime: Runtime) -> None:
        self._release = threading.Event()
        entered = threading.Event()

        def hold() -> None:
            entered.set()
            self._release.wait(TIMEOUT_S)

        runtime.call(hold)
        entered.wait(TIMEOUT_S)

    def release(self) -> None:
        self._release.set()

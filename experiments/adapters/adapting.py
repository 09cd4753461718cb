"""Adapters beside the seed's upper FFNs, trained with the product's own parts: trunk, gates, experts, sparse Adam.

One form for all: `experts` adapters of rank `rank` in each adapted layer, `per_token` of them for a token. One adapter
without a choice is a layer with one expert, so that arms differ in nothing but that.

Shapes: B windows of a batch, W windows, T tokens of a window, D model width, R rank, K experts per token, E experts of
a layer.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from experiments.arms.training import log_likelihood
from node.model.learning_rate import learning_rate_factor
from node.model.moe import LocalExperts, MoE
from node.trainer.train_step import new_layers, next_token_loss
from protocol.manifest import Manifest, OptimizerConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from experiments.adapters.domains import DomainName
    from experiments.adapters.seed import Progress, Seed
    from node.model.gate import GateOutput
    from node.model.moe import Experts
    from node.model.pretrained import PretrainedTrunk
    from protocol.manifest import GateKind

STEP_WINDOWS = 2
TEST_WINDOWS = 4
WARMUP = 0.05
"""Part of the tokens over which the rate rises."""

BLOCK_EXPERTS = 32


@dataclass(frozen=True, kw_only=True)
class AdapterGrid:
    """Adapters of each adapted layer."""

    rank: int
    experts: int = 1
    per_token: int = 1
    gate: GateKind = "topk"


@dataclass(frozen=True, kw_only=True)
class AdapterRun:
    """One training: `rate` is the peak of the adapters' and their gate's."""

    grid: AdapterGrid
    layers: int
    rate: float
    seed: int

    def manifest(self, around: Manifest, tokens: int) -> Manifest:
        """The run that a swarm would train: each adapted layer of the seed, whose manifest is `around`, is its own."""
        grid = self.grid
        model = replace(
            around.model,
            n_layers=self.layers,
            expert_hidden=grid.rank,
            experts_per_layer=grid.experts,
            experts_per_block=min(BLOCK_EXPERTS, grid.experts),
            experts_per_token=grid.per_token,
            gate=grid.gate,
        )
        optimizer = OptimizerConfig(
            lr=self.rate, expert_lr=self.rate, warmup_tokens=int(WARMUP * tokens), total_tokens=tokens
        )
        return replace(around, seed=self.seed, model=model, optimizer=optimizer)


class Gated:
    """The seed's trunk with a layer of gated adapters, wherever these are, beside each of its upper FFNs."""

    def __init__(self, manifest: Manifest, seed: Seed, experts: Experts) -> None:
        self.manifest, self._experts = manifest, experts
        self.layers = new_layers(manifest, experts, torch.Generator().manual_seed(manifest.seed))
        self.trunk = seed.trunk(self.layers)
        adam = manifest.optimizer
        self._gates = torch.optim.AdamW(
            self.trunk.parameters(), betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
        )

    def step(self, ids_BT: torch.Tensor) -> float:
        """One optimizer step of experts (during backward) and gates; the loss before it, in nats per token."""
        self.trunk.train()
        loss = next_token_loss(self.trunk, ids_BT, ids_BT.device)
        parameters, adam = list(self.trunk.parameters()), self.manifest.optimizer
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, adam.grad_clip)
        self._gates.param_groups[0]["lr"] = adam.lr * learning_rate_factor(adam, self._experts.run_tokens)
        self._gates.step()
        for layer in self.layers:
            layer.balance()
        self._experts.run_tokens += ids_BT[:, 1:].numel()
        return float(loss.detach())

    def gate_stats(self) -> list[dict[str, float]]:
        """Return the statistics of each layer's gate over the last steps."""
        return [asdict(layer.gate.stats()) for layer in self.layers]


class Adapters(Gated):
    """Gated layers with the adapters in this process, where their weights can be read."""

    def __init__(self, manifest: Manifest, seed: Seed) -> None:
        self.experts = LocalExperts(manifest)
        super().__init__(manifest, seed, self.experts)

    def weights(self) -> list[dict[str, torch.Tensor]]:
        """`w_in` [E, D, R] and `w_out` [E, R, D] of each layer."""
        layers = self.experts.blocks.values()
        return [{name: torch.cat([block.params[name] for block in own]) for name in own[0].params} for own in layers]


def train_adapters(run: AdapterRun, seed: Seed, texts: Sequence[torch.Tensor], progress: Progress) -> Adapters:
    """New adapters, in this process."""
    adapters = Adapters(manifest_for(run, seed, texts), seed)
    train(adapters, texts, progress)
    return adapters


def manifest_for(run: AdapterRun, seed: Seed, texts: Sequence[torch.Tensor]) -> Manifest:
    """Make the manifest of a run that learns from each window of `texts` once."""
    return run.manifest(seed.manifest, sum(n_tokens(ids_WT) for ids_WT in texts))


def n_tokens(ids_WT: torch.Tensor) -> int:
    """How many tokens of these windows are foretold: all but the first of each."""
    return ids_WT[:, 1:].numel()


def train(adapters: Gated, texts: Sequence[torch.Tensor], progress: Progress) -> None:
    """Train on each window of `texts` once, those of all texts mixed, in an order of the run's seed."""
    ids_WT = torch.cat(list(texts))
    order_W = torch.randperm(len(ids_WT), generator=torch.Generator().manual_seed(adapters.manifest.seed))
    for start in range(0, len(order_W), STEP_WINDOWS):
        ids_BT = ids_WT[order_W[start : start + STEP_WINDOWS]]
        loss = adapters.step(ids_BT)
        progress(start + len(ids_BT), len(order_W), f"{loss:.3f} nats per token")


def train_apart(
    run: AdapterRun, seed: Seed, texts: Mapping[DomainName, torch.Tensor], progress: Progress
) -> dict[DomainName, Adapters]:
    """Adapters of each domain, each trained on that domain's text alone, from the same start."""
    found: dict[DomainName, Adapters] = {}
    for name, ids_WT in texts.items():

        def part(done: float, total: float, words: str, before: int = len(found), name: str = name) -> None:
            progress(before + done / total, len(texts), f"{name}: {words}")

        found[name] = train_adapters(run, seed, [ids_WT], part)
    return found


def nats_per_token(trunk: PretrainedTrunk, ids_WT: torch.Tensor) -> torch.Tensor:
    """[W, T] float64 of windows [W, T + 1]."""
    return -log_likelihood(trunk, ids_WT.split(TEST_WINDOWS))


def nats_per_window(trunk: PretrainedTrunk, ids_WT: torch.Tensor) -> list[float]:
    """Mean over the tokens of each window; as `nats_per_token`."""
    found: list[float] = nats_per_token(trunk, ids_WT).mean(1).tolist()
    return found


def moe_layers(trunk: PretrainedTrunk) -> list[MoE]:
    """Return the layers of a trunk all of whose adapters are behind gates."""
    return [layer for layer in trunk.moe_layers if isinstance(layer, MoE)]


def nats_and_choices(trunk: PretrainedTrunk, ids_WT: torch.Tensor) -> tuple[list[float], list[torch.Tensor]]:
    """Return `nats_per_window`, and for each layer the experts that its gate chose, [W, T * K]."""
    layers = moe_layers(trunk)
    chosen: list[list[torch.Tensor]] = [[] for _ in layers]
    with ExitStack() as hooks:
        for layer, own in zip(layers, chosen, strict=True):
            hooks.enter_context(layer.gate.register_forward_hook(_collector(own)))
        nats = nats_per_window(trunk, ids_WT)
    return nats, [torch.cat(ids).view(len(ids_WT), -1) for ids in chosen]


def _collector(into: list[torch.Tensor]) -> Callable[[nn.Module, object, GateOutput], None]:
    def collect(_gate: nn.Module, _inputs: object, output: GateOutput) -> None:
        into.append(output.expert_ids_TK)

    return collect

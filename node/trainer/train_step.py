"""One training step of the trunk: micro-batches in flight, gradients summed in order, clipped, applied. No sockets.

The same code trains over a swarm (`Dispatcher`) and in one process (`LocalExperts`). Experts are stepped by whoever
holds them, during each micro-batch's backward; the trunk steps once per step. Between steps, averaging may move it.

Shapes: B sequences, T positions, V vocabulary, E experts of a layer.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import functional

from common.errors import DivergedError, InvalidInputError, TooFewExpertsError
from node.model.gate import ChoiceProbe, build_gate
from node.model.learning_rate import learning_rate_factor
from node.model.moe import MoE
from node.model.transformer import Transformer
from node.trainer.concurrency_tuner import ConcurrencyTuner
from node.trainer.trunk_lock import TrunkLock
from protocol.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

    from transformers import PreTrainedModel

    from node.data import TextDataset
    from node.model.moe import Experts
    from node.model.trunk import Trunk
    from protocol.manifest import Manifest

MAX_STEPS_LEFT_OUT = 10
"""Steps left out in a row, for gradients that are not finite, end a training: one is bad luck, ten are a standstill."""

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Which data a trainer reads, and how much at once; `in_flight` micro-batches, or, if 0, as many as it is worth."""

    batch: int = 16
    micro_batches: int = 2
    in_flight: int = 0
    shard: int = 0
    n_shards: int = 1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step. `loss` in nats per token; `overflow` pairs beyond the gate's capacity; `in_flight` micro-batches."""

    loss: float
    grad_norm: float
    lr: float
    n_tokens: int
    overflow: int
    seconds: float
    in_flight: int = 1


class Training:
    """Owns the trunk's optimizer and place in the data. Its micro-batches run on threads; steps come one at a time.

    `run_tokens`, the place in the learning-rate schedule, is the whole run's: whoever knows of other trainers sets it
    before a step; the same for `rate_scale`, which multiplies the trunk's rate. `own_tokens` are those that this
    training did itself; `version` counts the trunk's optimizer steps, which averaging may move ahead of `steps_done`,
    the place in the data.

    `on_too_few` is called, in a compute thread, when too few experts answer: it waits (or raises, to give up), after
    which the micro-batch starts again. Nothing has stepped by then, as that only happens in a forward.
    """

    def __init__(
        self,
        manifest: Manifest,
        model: Trunk,
        experts: Experts,
        dataset: TextDataset,
        config: StepConfig,
        on_too_few: Callable[[TooFewExpertsError], None],
    ) -> None:
        self.manifest, self.model, self.dataset, self.config = manifest, model, dataset, config
        self.moe_layers = [module for module in model.modules() if isinstance(module, MoE)]
        self.probe = ChoiceProbe([layer.gate for layer in self.moe_layers])
        self._experts, self._on_too_few = experts, on_too_few
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        adam = manifest.optimizer
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=adam.lr,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
        )
        self._pool = ThreadPoolExecutor(config.micro_batches, thread_name_prefix="kilohive-micro-batch")
        self.trunk_lock = TrunkLock(self._pool)
        self.concurrency_tuner = ConcurrencyTuner(config.micro_batches, config.in_flight)
        self.steps_done = 0
        self.version = 0
        self.run_tokens = 0
        self.own_tokens = 0
        self.rate_scale = 1.0
        self._left_out = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step, all micro-batches together."""
        return self.config.batch * self.config.micro_batches * self.manifest.model.context

    @property
    def is_sound(self) -> bool:
        """Whether every parameter is finite."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters)

    def step(self) -> StepResult:
        """Train on the next micro-batches. Raises DivergedError when nothing can be learnt any more."""
        with self.trunk_lock.turn():
            return self._step()

    def call(self, function: Callable[[], R]) -> Future[R]:
        """Run `function`, which may change parameters in place, while no micro-batch runs; see `TrunkLock.call`.

        A step that waits for experts holds it up: autograd has saved the very weights that it may change.
        """
        return self.trunk_lock.call(function)

    def look(self, function: Callable[[], R]) -> Future[R]:
        """Run `function`, which changes nothing, also while micro-batches are in flight; see `TrunkLock.look`."""
        return self.trunk_lock.look(function)

    def _step(self) -> StepResult:
        started = time.perf_counter()
        self.model.train()
        self._experts.run_tokens = self.run_tokens
        first = self.steps_done * self.config.micro_batches
        results = self._in_flight(self._micro_batch, range(first, first + self.config.micro_batches))
        with self.trunk_lock.changing():
            grad_norm, lr = self._apply([gradients for _, gradients in results])
            overflow = self._balance()
            self.steps_done += 1
            self.run_tokens += self.tokens_per_step
            self.own_tokens += self.tokens_per_step
        seconds, in_flight = time.perf_counter() - started, self.concurrency_tuner.in_flight
        self.concurrency_tuner.learn(self.tokens_per_step / seconds)
        return StepResult(
            loss=sum(loss for loss, _ in results) / len(results),
            grad_norm=grad_norm,
            lr=lr,
            n_tokens=self.tokens_per_step,
            overflow=overflow,
            seconds=seconds,
            in_flight=in_flight,
        )

    def evaluate(self, max_bytes: int) -> float:
        """Held-out loss in nats per token, over about `max_bytes` from all over the held-out text."""
        context = self.manifest.model.context
        batches = self.dataset.held_out_batches(self.config.batch, context, max_bytes)
        with self.trunk_lock.turn():
            self.model.eval()
            results = self._in_flight(self._held_out, enumerate(batches))
        return sum(nats for nats, _ in results) / sum(n for _, n in results)

    def close(self) -> None:
        """End the threads; a micro-batch that still waits must have been released by `on_too_few` or its calls."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.trunk_lock.close()

    def _in_flight(self, function: Callable[[A], R], items: Iterable[A]) -> list[R]:
        """Results in the order of `items`, as many of them running as the pace allows."""
        futures: list[Future[R]] = []
        running: set[Future[R]] = set()
        try:
            for item in items:
                while len(running) >= self.concurrency_tuner.in_flight:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    _raise_first(done)
                futures.append(self._pool.submit(self.until_enough, function, item))
                running.add(futures[-1])
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def until_enough(self, function: Callable[[A], R], item: A) -> R:
        """`function(item)`, again and again while too few experts answer."""
        while True:
            try:
                return function(item)
            except TooFewExpertsError as error:
                self._on_too_few(error)

    def _micro_batch(self, index: int) -> tuple[float, Sequence[torch.Tensor | None]]:
        config = self.config
        ids = self.dataset.train_batch(
            index,
            shard=config.shard,
            n_shards=config.n_shards,
            batch=config.batch,
            context=self.manifest.model.context,
            seed=config.seed,
        )
        loss = self._finite_loss(ids)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return float(loss.detach()), gradients

    @torch.no_grad()
    def _held_out(self, batch: tuple[int, torch.Tensor]) -> tuple[float, int]:
        index, ids = batch
        n_tokens = ids[:, 1:].numel()
        # The first micro-batch stands for all: what gates keep is a mean over thousands of tokens.
        with self.probe.looking(ids) if index == 0 else nullcontext():
            loss = float(self._finite_loss(ids))
        return loss * n_tokens, n_tokens

    def _finite_loss(self, ids: torch.Tensor) -> torch.Tensor:
        try:
            loss = next_token_loss(self.model, ids, self.device)
        except InvalidInputError as error:  # nothing but the trunk makes what goes to the experts
            raise DivergedError(f"the trunk computes what no host would take ({error})") from None
        if not math.isfinite(float(loss.detach())):
            raise DivergedError(f"the loss is not finite, it is {float(loss.detach())}")
        return loss

    def _apply(self, per_micro_batch: Sequence[Sequence[torch.Tensor | None]]) -> tuple[float, float]:
        for index, parameter in enumerate(self.parameters):
            parts = [gradients[index] for gradients in per_micro_batch]
            known = [part for part in parts if part is not None]
            parameter.grad = torch.stack(known).sum(0).div_(len(parts)) if known else None
        adam = self.manifest.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, adam.grad_clip)
        lr = adam.lr * learning_rate_factor(adam, self.run_tokens) * self.rate_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_fraction"]
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
            self.version += 1
            self._left_out = 0
        else:
            self._left_out += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self._left_out >= MAX_STEPS_LEFT_OUT:
            raise DivergedError(f"the gradient is not finite for the {self._left_out}th step in a row")
        return float(norm), lr

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters by what part of the trunk's rate they learn at: gates apart from all others."""
        gates = {id(p) for layer in self.moe_layers for p in layer.gate.parameters()}
        parts = (
            (1.0, [p for p in self.parameters if id(p) not in gates]),
            (self.manifest.optimizer.gate_lr_fraction, [p for p in self.parameters if id(p) in gates]),
        )
        return [{"params": params, "lr_fraction": fraction} for fraction, params in parts if params]

    def _balance(self) -> int:
        return sum(layer.balance() for layer in self.moe_layers)


def _raise_first(done: Iterable[Future[R]]) -> None:
    for future in done:
        future.result()


def next_token_loss(model: Trunk, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Mean cross-entropy, in nats per token, of windows [B, T + 1]."""
    ids = ids.to(device)
    logits_BTV = model(ids[:, :-1])
    return functional.cross_entropy(logits_BTV.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def mean_nats(model: Trunk, batches: Iterable[torch.Tensor], device: torch.device) -> float:
    """Nats per token over windows [B, T + 1], one batch after the other."""
    sums = [(float(next_token_loss(model, ids, device)) * ids[:, 1:].numel(), ids[:, 1:].numel()) for ids in batches]
    return sum(nats for nats, _ in sums) / sum(n for _, n in sums)


def build_model(
    manifest: Manifest, experts: Experts, generator: torch.Generator, pretrained: PreTrainedModel | None = None
) -> Trunk:
    """The trunk with gates of its own around a run's experts; see `build_trunk`."""
    return build_trunk(manifest, new_layers(manifest, experts, generator), generator, pretrained)


def build_transformer(manifest: Manifest, experts: Experts, generator: torch.Generator) -> Transformer:
    """Like `build_model`, for a run whose trunk is not a pretrained one."""
    layers = new_layers(manifest, experts, generator)
    return Transformer(manifest.model, layers, generator).to(DTYPES[manifest.dtype])


def new_layers(manifest: Manifest, experts: Experts, generator: torch.Generator) -> list[MoE]:
    """The run's layers of experts, with gates as they are before training."""
    return [MoE(build_gate(manifest.model, generator), experts, layer) for layer in range(manifest.model.n_layers)]


def build_trunk(
    manifest: Manifest, layers: Sequence[MoE], generator: torch.Generator, pretrained: PreTrainedModel | None = None
) -> Trunk:
    """The trunk around `layers`, in the run's dtype; DataError where a pretrained one is not on this machine.

    The pretrained model is read from its files, unless it is given as `pretrained`.
    """
    if manifest.model.trunk == "hf":
        # These bring the library `transformers`, which takes a second, and few runs need it.
        from node.model.pretrained import PretrainedTrunk  # noqa: PLC0415
        from node.model.pretrained_files import language_model  # noqa: PLC0415

        pretrained = language_model(manifest.pretrained) if pretrained is None else pretrained
        return PretrainedTrunk(manifest, pretrained, layers, generator).to(DTYPES[manifest.dtype])
    return Transformer(manifest.model, layers, generator).to(DTYPES[manifest.dtype])

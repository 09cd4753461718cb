"""Runs batches over a host's blocks: which jobs may be merged, what they yield, and whether they step the experts.

Not thread-safe: owned by the runtime's thread; its counters may be read anywhere.

Shapes: T tokens, P pairs, D model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protocol.manifest import AveragingConfig
import logging
from collections import deque
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.errors import DeadlineError, KilohiveError, NoRoomError, UnknownRequestError
from node.host.serving.activation_cache import ActivationCache, SteppedIds
from node.host.serving.hosted_blocks import HostedBlocks
from node.host.serving.jobs import BackwardJob, BackwardResult, ForwardJob, ForwardResult, Job, merged_inputs
from node.model.devices import first_line, is_out_of_memory
from node.model.experts.layer import LayerGradients, layer_backward, layer_forward
from node.model.learning_rate import learning_rate_factor
from node.model.pairs import Pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.host.serving.activation_cache import CheckedInputs
    from node.model.experts.block import Block, BlockGradients
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)


class _Effect(Enum):
    """What a job may do to the weights: jobs of one batch share one effect."""

    NONE = "none"
    STEP = "step"
    STALE = "stale"
    """Steps less or not at all, so never in one batch with another: a batch has one learning rate."""


class _Ready(NamedTuple):
    """A backward that can be answered."""

    job: BackwardJob
    inputs: CheckedInputs
    staleness: int


class BatchRunner:
    """Forward and backward over `blocks`; remembers inputs for backward and which requests have stepped."""

    def __init__(
        self, blocks: Sequence[Block], manifest: Manifest, kept: ActivationCache, clock: Callable[[], float]
    ) -> None:
        self.blocks = HostedBlocks(blocks)
        self.rate, self.staleness = Rate(clock), RecentMean()
        self.tokens_total = 0
        self.steps_refused = 0
        self.out_of_memory = 0
        self.failed_in_a_row = 0
        self._optimizer, self._averaging = manifest.optimizer, manifest.averaging
        self._kept, self._clock = kept, clock
        self._stepped = SteppedIds()

    def take_batch(self, jobs: deque[Job], max_tokens: int) -> tuple[list[Job], deque[Job]]:
        """Oldest job and all that can be merged with it, up to `max_tokens`; and the rest, in their order."""
        if not jobs:
            return [], jobs
        head, rest = jobs[0], deque[Job]()
        effect, batch, keys, n_tokens = self._effect(head), [head], {head.key}, head.n_tokens
        for job in islice(jobs, 1, None):
            # A retry must not be merged with its original.
            fits = n_tokens + job.n_tokens <= max_tokens and job.key not in keys
            if fits and type(job) is type(head) and job.key.layer == head.key.layer and self._joins(job, effect):
                batch.append(job)
                keys.add(job.key)
                n_tokens += job.n_tokens
            else:
                rest.append(job)
        return batch, rest

    def run(self, batch: list[Job]) -> None:
        """Settle the future of every job."""
        now = self._clock()
        alive = [job for job in batch if job.future.set_running_or_notify_cancel()]
        for job in [job for job in alive if job.deadline <= now]:
            job.future.set_exception(DeadlineError("the deadline passed while the request waited; nothing was done"))
            alive.remove(job)
        try:
            self._forward([job for job in alive if isinstance(job, ForwardJob)])
            self._backward([job for job in alive if isinstance(job, BackwardJob)])
        except Exception as error:  # noqa: BLE001 - task boundary: one batch must not end the thread that owns the weights
            failure = self._failure_of(error)
            for job in alive:
                if not job.future.done():
                    job.future.set_exception(failure)

    def _failure_of(self, error: Exception) -> KilohiveError:
        if is_out_of_memory(error):
            self.out_of_memory += 1
            return NoRoomError("this host's device had no memory for the batch: choose another replica")
        if isinstance(error, KilohiveError):
            return error
        self.failed_in_a_row += 1
        if self.failed_in_a_row == 1:  # the next ones are told together, by `node/host/device_watch.py`
            logger.error("A batch failed", exc_info=error)
        return KilohiveError("the host failed on this batch")

    def _joins(self, job: Job, effect: _Effect) -> bool:
        return effect is not _Effect.STALE and self._effect(job) is effect

    def _effect(self, job: Job) -> _Effect:
        if isinstance(job, ForwardJob) or job.no_step or job.key in self._stepped:
            return _Effect.NONE
        inputs = job.inputs or self._kept.get(job.key)
        stale = inputs is not None and is_stale(self._averaging, self._staleness(job, inputs))
        return _Effect.STALE if stale else _Effect.STEP

    def _staleness(self, job: BackwardJob, inputs: CheckedInputs) -> int:
        return staleness_of(self.blocks.version(inputs.blocks), job.version)

    def _forward(self, jobs: list[ForwardJob]) -> None:
        jobs = [job for job in jobs if self._hosted(job)]
        if not jobs:
            return
        merged = merged_inputs([job.inputs for job in jobs])
        with torch.no_grad():
            y_TD = layer_forward(self.blocks.layer(jobs[0].key.layer), merged.x_TD, merged.pairs)
        for job in jobs:
            if job.keep:
                self._kept.put(job.key, job.inputs)
        self.failed_in_a_row = 0
        self.tokens_total += len(y_TD)
        self.rate.add(len(y_TD))
        for job, part_TD in zip(jobs, y_TD.split([job.n_tokens for job in jobs]), strict=True):
            version = self.blocks.version(job.inputs.blocks)
            job.future.set_result(ForwardResult(combined_TD=part_TD, version=version))

    def _hosted(self, job: ForwardJob) -> bool:
        """Whether its blocks are still here; if one left while the job waited, the job alone is told."""
        try:
            self.blocks.check(job.inputs.blocks)
        except KilohiveError as error:
            job.future.set_exception(error)
            return False
        return True

    def _backward(self, jobs: list[BackwardJob]) -> None:
        ready = []
        for job in jobs:
            try:
                ready.append(self._ready(job))
            except KilohiveError as error:
                job.future.set_exception(error)
        if not ready:
            return
        merged = merged_inputs([one.inputs for one in ready])
        grad_TD = torch.cat([one.job.grad_TD for one in ready]) if len(ready) > 1 else ready[0].job.grad_TD
        step = self._stepper(ready)
        blocks = self.blocks.layer(ready[0].job.key.layer)
        gradients = layer_backward(blocks, merged.x_TD, merged.pairs, grad_TD, step or _no_step)
        self._answer(ready, gradients, stepped=step is not None)

    def _ready(self, job: BackwardJob) -> _Ready:
        inputs = job.inputs or self._kept.get(job.key)
        if inputs is None:
            raise UnknownRequestError("the inputs are no longer kept here: send them again")
        if len(inputs.x_TD) != job.n_tokens:
            raise UnknownRequestError(f"the forward had {len(inputs.x_TD)} tokens, the gradient has {job.n_tokens}")
        self.blocks.check(inputs.blocks)
        return _Ready(job, inputs, self._staleness(job, inputs))

    def _stepper(self, ready: list[_Ready]) -> Callable[[Block, BlockGradients], None] | None:
        """How to step the blocks for a batch, whose jobs share one effect; None for gradients only."""
        if self._effect(ready[0].job) is _Effect.NONE:
            return None
        for one in ready:
            self.staleness.add(one.staleness)
        # More than one job: none of them is stale.
        scale = rate_scale(self._averaging, max(one.staleness for one in ready))
        if scale is None:
            self.steps_refused += len(ready)
            return None
        for one in ready:
            self._stepped.add(one.job.key)
        factor = learning_rate_factor(self._optimizer, max(one.job.run_tokens for one in ready))
        lr = self._optimizer.expert_lr * factor * scale
        return lambda block, gradients: block.step(gradients, lr, self._optimizer)

    def _answer(self, ready: list[_Ready], gradients: LayerGradients, *, stepped: bool) -> None:
        self.failed_in_a_row = 0
        tokens = gradients.tokens_TD.split([one.job.n_tokens for one in ready])
        weights = gradients.weight_P.split([len(one.inputs.pairs.weight_P) for one in ready])
        for one, part_TD, part_P in zip(ready, tokens, weights, strict=True):
            # A late retry sends its inputs again; keeping them for it would cost every request's memory.
            self._kept.take(one.job.key)
            one.job.future.set_result(
                BackwardResult(tokens_TD=part_TD, weight_P=part_P, stepped=stepped, staleness=one.staleness)
            )


def try_forward(block: Block, d_model: int, device: torch.device) -> str:
    """What goes wrong when one token of zeros passes a block's first expert; empty if nothing does."""
    token_P = torch.zeros(1, dtype=torch.int64, device=device)
    x_TD = torch.zeros(1, d_model, dtype=next(iter(block.params.values())).dtype, device=device)
    try:
        with torch.no_grad():
            y_TD = layer_forward([block], x_TD, Pairs(token_P, token_P + block.experts.start, x_TD[:, 0] + 1))
        return "" if bool(torch.isfinite(y_TD).all()) else "what it computes is not finite"
    except RuntimeError as error:
        return first_line(error)


def _no_step(_block: Block, _gradients: BlockGradients) -> None:
    """Gradients for the caller; the weights get none."""


def staleness_of(version_now: int, version_then: int) -> int:
    """Optimizer steps between two versions; none if the caller claims to come from the future."""
    return max(0, version_now - version_then)


def is_stale(averaging: AveragingConfig, staleness: int) -> bool:
    """Whether a gradient of this age is over the run's limit; a limit of 0 is none."""
    return 0 < averaging.max_staleness < staleness


def rate_scale(averaging: AveragingConfig, staleness: int) -> float | None:
    """What to multiply the learning rate with, in (0, 1]; None to take no step."""
    if not is_stale(averaging, staleness):
        return 1.0
    return None if averaging.stale_action == "refuse" else averaging.max_staleness / staleness


RATE_HALF_LIFE_S = 10.0
RECENT = 100
"""Values over which a recent mean reaches back."""


class Rate:
    """Exponentially decaying amount per second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last, self._mass = clock, clock(), 0.0

    def add(self, amount: int) -> None:
        """Count `amount` as of now."""
        now = self._clock()
        self._mass = self._mass * math.exp2(-(now - self._last) / RATE_HALF_LIFE_S) + amount
        self._last = now

    def value(self) -> float:
        """Amount per second, lately."""
        decayed = self._mass * math.exp2(-(self._clock() - self._last) / RATE_HALF_LIFE_S)
        return decayed * math.log(2) / RATE_HALF_LIFE_S


class RecentMean:
    """Exponential mean over about the last `RECENT` values; the plain mean until there are as many."""

    def __init__(self) -> None:
        self._count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        """Count one more value."""
        self._count = min(self._count + 1, RECENT)
        self.value += (value - self.value) / self._count

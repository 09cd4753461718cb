"""The one thread that owns a host's weights. It merges concurrent requests of a layer into one grouped product.

Requests come from the event loop through `submit`; a batch is every queued request of the same kind and layer, oldest
first. Between batches the thread runs whatever else needs the weights (`call`: checkpoints).

Shapes: T tokens, P pairs, D model width.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch

from node.experts.layer import LayerGradients, Pairs, layer_backward, layer_forward
from node.serving.kept_inputs import Inputs, KeptInputs, RequestKey, SteppedIds
from protocol.errors import DeadlineError, DrainingError, KilohiveError, OverloadedError, UnknownRequestError
from protocol.schedule import learning_rate_factor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.experts.block import Block, BlockGradients
    from protocol.manifest import BlockId, OptimizerConfig

R = TypeVar("R")
logger = logging.getLogger(__name__)

RATE_HALF_LIFE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Bounds of the queue, of a merged batch and of the inputs kept for backward."""

    max_queue_tokens: int = 65_536
    max_batch_tokens: int = 16_384
    keep_inputs_bytes: int = 256 << 20
    keep_inputs_s: float = 120.0


@dataclass(frozen=True, kw_only=True)
class ForwardJob:
    """One Forward request, checked."""

    key: RequestKey
    inputs: Inputs
    keep: bool
    deadline: float
    future: Future[torch.Tensor] = field(default_factory=Future)

    @property
    def n_tokens(self) -> int:
        """Rows of the request."""
        return len(self.inputs.x_TD)


@dataclass(frozen=True, kw_only=True)
class BackwardJob:
    """One Backward request, checked; `inputs` is None unless the caller sent them again."""

    key: RequestKey
    grad_TD: torch.Tensor
    inputs: Inputs | None
    run_tokens: int
    deadline: float
    future: Future[BackwardResult] = field(default_factory=Future)

    @property
    def n_tokens(self) -> int:
        """Rows of the request."""
        return len(self.grad_TD)


@dataclass(frozen=True)
class BackwardResult:
    """Gradients of one request, and whether it stepped the experts."""

    tokens_TD: torch.Tensor
    weight_P: torch.Tensor
    stepped: bool


Job = ForwardJob | BackwardJob


class Runtime:
    """Runs jobs over `blocks` on its own thread, first come first served, merged by kind and layer."""

    def __init__(
        self,
        blocks: Sequence[Block],
        optimizer: OptimizerConfig,
        config: RuntimeConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layers: dict[int, list[Block]] = {}
        for block in sorted(blocks, key=lambda b: b.id):
            self._layers.setdefault(block.id.layer, []).append(block)
        self._optimizer, self._config, self._clock = optimizer, config, clock
        self._kept = KeptInputs(config.keep_inputs_bytes, config.keep_inputs_s, clock)
        self._stepped = SteppedIds()
        self._jobs: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._rate = _Rate(clock)
        self._thread = threading.Thread(target=self._run, name="kilohive-runtime", daemon=True)
        self.queue_tokens = 0
        self.tokens_total = 0
        self.refused = 0

    @property
    def blocks(self) -> dict[BlockId, Block]:
        """Every hosted block. Read its counters anywhere; touch its weights only inside `call`."""
        return {block.id: block for blocks in self._layers.values() for block in blocks}

    @property
    def kept_bytes(self) -> int:
        """Memory held for backward, in bytes."""
        return self._kept.n_bytes

    @property
    def tokens_per_s(self) -> float:
        """Recent forward tokens per second."""
        return self._rate.value()

    def layer_blocks(self, layer: int) -> list[Block]:
        """Hosted blocks of `layer`, in order."""
        return self._layers.get(layer, [])

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Refuse new work, finish what is queued, end the thread; call off the loop."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("The runtime did not finish its queue within %.1f s", timeout_s)

    def submit(self, job: Job) -> None:
        """Queue a job; raises OverloadedError with a delay when the queue is full, DrainingError when leaving."""
        with self._wake:
            if self._stopping:
                raise DrainingError("this host is leaving: choose another replica")
            # An empty queue takes any size: a request over the bound would otherwise never get in.
            if self.queue_tokens and self.queue_tokens + job.n_tokens > self._config.max_queue_tokens:
                self.refused += 1
                raise OverloadedError(
                    f"queue: {self.queue_tokens} tokens wait, the limit is {self._config.max_queue_tokens}",
                    retry_after_s=self._drain_estimate_s(),
                )
            self._jobs.append(job)
            self.queue_tokens += job.n_tokens
            self._wake.notify()

    def call(self, function: Callable[[], R]) -> Future[R]:
        """Run `function` on the thread that owns the weights, between batches."""
        result: Future[R] = Future()

        def run() -> None:
            _settle(result, function)

        with self._wake:
            if self._stopping:
                raise DrainingError("this host is leaving")
            self._calls.append(run)
            self._wake.notify()
        return result

    def _drain_estimate_s(self) -> float:
        return min(5.0, max(0.05, self.queue_tokens / max(self.tokens_per_s, 1000.0)))

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._jobs or self._calls or self._stopping):
                    self._wake.wait()
                if not (self._jobs or self._calls):
                    return
                calls, self._calls = self._calls, deque()
                batch = self._take_batch()
            for run in calls:
                run()
            if batch:
                self._run_batch(batch)

    def _take_batch(self) -> list[Job]:
        """Oldest job and all that can be merged with it, up to the batch's bound; the rest keep their order."""
        batch: list[Job] = []
        rest: deque[Job] = deque()
        tokens = 0
        for job in self._jobs:
            fits = not batch or tokens + job.n_tokens <= self._config.max_batch_tokens
            if fits and self._mergeable(batch, job):
                batch.append(job)
                tokens += job.n_tokens
            else:
                rest.append(job)
        self._jobs = rest
        self.queue_tokens -= tokens
        return batch

    def _mergeable(self, batch: list[Job], job: Job) -> bool:
        if not batch:
            return True
        head = batch[0]
        if type(job) is not type(head) or job.key.layer != head.key.layer:
            return False
        # A retry must not be merged with its original, nor with requests that may step.
        stepped = job.key in self._stepped, head.key in self._stepped
        return stepped[0] == stepped[1] and all(job.key != other.key for other in batch)

    def _run_batch(self, batch: list[Job]) -> None:
        now = self._clock()
        alive = [job for job in batch if job.future.set_running_or_notify_cancel()]
        for job in [job for job in alive if job.deadline <= now]:
            job.future.set_exception(DeadlineError("the deadline passed while the request waited; nothing was done"))
            alive.remove(job)
        forwards = [job for job in alive if isinstance(job, ForwardJob)]
        backwards = [job for job in alive if isinstance(job, BackwardJob)]
        try:
            if forwards:
                self._forward(forwards)
            if backwards:
                self._backward(backwards)
        except Exception as error:  # task boundary: one batch must not end the thread that owns the weights
            logger.exception("A batch failed")
            failure = error if isinstance(error, KilohiveError) else KilohiveError("the host failed on this batch")
            for job in alive:
                if not job.future.done():
                    job.future.set_exception(failure)

    def _forward(self, jobs: list[ForwardJob]) -> None:
        merged = _merge([job.inputs for job in jobs])
        with torch.no_grad():
            y_TD = layer_forward(self._layers.get(jobs[0].key.layer, []), merged.x_TD, merged.pairs)
        for job in jobs:
            if job.keep:
                self._kept.put(job.key, job.inputs)
        self._count(len(y_TD))
        for job, part_TD in zip(jobs, y_TD.split([job.n_tokens for job in jobs]), strict=True):
            job.future.set_result(part_TD)

    def _backward(self, jobs: list[BackwardJob]) -> None:
        ready: list[tuple[BackwardJob, Inputs]] = []
        for job in jobs:
            inputs = job.inputs or self._kept.get(job.key)
            if inputs is None:
                job.future.set_exception(UnknownRequestError("the inputs are no longer kept here: send them again"))
            elif len(inputs.x_TD) != job.n_tokens:
                job.future.set_exception(
                    UnknownRequestError(f"the forward had {len(inputs.x_TD)} tokens, the gradient has {job.n_tokens}")
                )
            else:
                ready.append((job, inputs))
        if not ready:
            return
        merged = _merge([inputs for _, inputs in ready])
        grad_TD = torch.cat([job.grad_TD for job, _ in ready]) if len(ready) > 1 else ready[0][0].grad_TD
        stepper = self._stepper([job for job, _ in ready])
        blocks = self._layers.get(jobs[0].key.layer, [])
        gradients = layer_backward(blocks, merged.x_TD, merged.pairs, grad_TD, stepper or _no_step)
        self._answer(ready, gradients, stepped=stepper is not None)

    def _stepper(self, jobs: list[BackwardJob]) -> Callable[[Block, BlockGradients], None] | None:
        """How to step the blocks for these jobs; None if they have stepped before (all of a batch have, or none)."""
        if jobs[0].key in self._stepped:
            return None
        for job in jobs:
            self._stepped.add(job.key)
        factor = learning_rate_factor(self._optimizer, max(job.run_tokens for job in jobs))
        return lambda block, gradients: block.step(gradients, self._optimizer.expert_lr * factor, self._optimizer)

    def _answer(self, ready: list[tuple[BackwardJob, Inputs]], gradients: LayerGradients, *, stepped: bool) -> None:
        tokens = gradients.tokens_TD.split([job.n_tokens for job, _ in ready])
        weights = gradients.weight_P.split([len(inputs.pairs.weight_P) for _, inputs in ready])
        for (job, _), part_TD, part_P in zip(ready, tokens, weights, strict=True):
            # A late retry sends its inputs again; keeping them for it would cost every request's memory.
            self._kept.take(job.key)
            job.future.set_result(BackwardResult(tokens_TD=part_TD, weight_P=part_P, stepped=stepped))

    def _count(self, n_tokens: int) -> None:
        self.tokens_total += n_tokens
        self._rate.add(n_tokens)


class _Rate:
    """Exponentially decaying tokens per second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last, self._mass = clock, clock(), 0.0

    def add(self, amount: int) -> None:
        self._decay()
        self._mass += amount

    def value(self) -> float:
        decayed = self._mass * math.exp2(-(self._clock() - self._last) / RATE_HALF_LIFE_S)
        return decayed * math.log(2) / RATE_HALF_LIFE_S

    def _decay(self) -> None:
        now = self._clock()
        self._mass *= math.exp2(-(now - self._last) / RATE_HALF_LIFE_S)
        self._last = now


def _no_step(_block: Block, _gradients: BlockGradients) -> None:
    """A retry gets its gradients; the weights have had theirs."""


def _merge(parts: list[Inputs]) -> Inputs:
    if len(parts) == 1:
        return parts[0]
    starts = [0]
    for part in parts[:-1]:
        starts.append(starts[-1] + len(part.x_TD))
    return Inputs(
        x_TD=torch.cat([part.x_TD for part in parts]),
        pairs=Pairs(
            token_P=torch.cat([part.pairs.token_P + start for part, start in zip(parts, starts, strict=True)]),
            expert_P=torch.cat([part.pairs.expert_P for part in parts]),
            weight_P=torch.cat([part.pairs.weight_P for part in parts]),
        ),
    )


def _settle(result: Future[R], function: Callable[[], R]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        result.set_result(function())
    except Exception as error:  # noqa: BLE001 - task boundary: the failure belongs to whoever waits for the result
        result.set_exception(error)

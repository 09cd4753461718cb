"""The one thread that owns a host's weights. It merges concurrent requests of a layer into one grouped product.

Requests come from the event loop through `submit`; a batch is every queued request of the same kind and layer, oldest
first. Between batches the thread runs whatever else needs the weights (`call`): checkpoints, averaging, blocks that
come and go; and it rests if the machine's owner limits it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from common.errors import DrainingError, OverloadedError
from common.tasks import settle
from node.host.serving.activation_cache import ActivationCache
from node.host.serving.batch_runner import BatchRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from node.host.serving.jobs import Job
    from node.model.experts.block import Block
    from protocol.manifest import BlockId, Manifest

R = TypeVar("R")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Bounds of the queue, of a merged batch and of the inputs kept for backward."""

    max_queue_tokens: int = 65_536
    max_batch_tokens: int = 16_384
    keep_inputs_bytes: int = 256 << 20
    keep_inputs_s: float = 120.0


class Runtime:
    """Runs jobs over `blocks` on its own thread, first come first served, merged by kind and layer.

    `rest_s` says how many seconds to rest before the next batch; asked from any thread.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        manifest: Manifest,
        config: RuntimeConfig,
        clock: Callable[[], float] = time.monotonic,
        rest_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._config, self._rest_s = config, rest_s
        self._kept = ActivationCache(config.keep_inputs_bytes, config.keep_inputs_s, clock)
        self._worker = BatchRunner(blocks, manifest, self._kept, clock)
        self._jobs: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kilohive-runtime", daemon=True)
        self.queue_tokens = 0
        self.refused = 0

    @property
    def blocks(self) -> Mapping[BlockId, Block]:
        """Every hosted block now. Read its counters anywhere; touch its weights only inside `call`."""
        return self._worker.blocks.by_id

    @property
    def kept_bytes(self) -> int:
        """Memory held for backward, in bytes."""
        return self._kept.n_bytes

    @property
    def tokens_per_s(self) -> float:
        """Recent forward tokens per second."""
        return self._worker.rate.value()

    @property
    def tokens_total(self) -> int:
        """Forward tokens since the start."""
        return self._worker.tokens_total

    @property
    def staleness(self) -> float:
        """Recent mean of the optimizer steps between a forward and its backward."""
        return self._worker.staleness.value

    @property
    def steps_refused(self) -> int:
        """Backwards that stepped nothing because they came too late."""
        return self._worker.steps_refused

    @property
    def out_of_memory(self) -> int:
        """Batches for which the device had no memory."""
        return self._worker.out_of_memory

    @property
    def failed_in_a_row(self) -> int:
        """Batches that failed since the last one that did not; those without memory are not counted."""
        return self._worker.failed_in_a_row

    def layer_blocks(self, layer: int) -> Sequence[Block]:
        """Hosted blocks of `layer` now, in order."""
        return self._worker.blocks.layer(layer)

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
        """Run `function` on the thread that owns the weights, between batches; DrainingError when leaving."""
        result: Future[R] = Future()

        def run() -> None:
            settle(result, function)

        with self._wake:
            if self._stopping:
                raise DrainingError("this host is leaving")
            self._calls.append(run)
            self._wake.notify()
        return result

    def add_block(self, block: Block) -> Future[None]:
        """Serve `block` from the next batch on, and own its weights; the future fails if its id is served already."""
        return self.call(lambda: self._worker.blocks.add(block))

    def remove_block(self, block_id: BlockId) -> Future[Block]:
        """Serve it no longer, and hand its weights over; the future fails with NotHostedError if it is not here.

        Requests for it that wait get NotHostedError; those they would have been merged with do not.
        """
        return self.call(lambda: self._worker.blocks.remove(block_id))

    def follow(self, config: RuntimeConfig) -> Future[None]:
        """Stay within these bounds from now on; how long inputs are kept stays as it was. The future: inputs fit."""
        with self._wake:
            self._config = config
        return self.call(lambda: self._kept.keep_at_most(config.keep_inputs_bytes))

    def forget_inputs(self) -> Future[None]:
        """Keep no inputs for a backward any more: callers send them again."""
        return self.call(self._kept.clear)

    def _drain_estimate_s(self) -> float:
        return min(5.0, max(0.05, self.queue_tokens / max(self.tokens_per_s, 1000.0)))

    def _run(self) -> None:
        while self._wait_for_work():
            # Calls first: what they change of blocks and versions decides what may be merged.
            for run in self._take_calls():
                run()
            batch = [] if self._resting_s() else self._take_batch()
            if batch:
                self._worker.run(batch)

    def _wait_for_work(self) -> bool:
        """False once everything is done and the host is leaving. Jobs wait for the end of a rest, calls do not."""
        with self._wake:
            while not (self._calls or self._stopping):
                resting_s = self._resting_s() if self._jobs else None
                if resting_s == 0:
                    break
                self._wake.wait(resting_s)
            return bool(self._jobs or self._calls)

    def _resting_s(self) -> float:
        return 0.0 if self._stopping else self._rest_s()

    def _take_calls(self) -> deque[Callable[[], None]]:
        with self._wake:
            calls, self._calls = self._calls, deque()
        return calls

    def _take_batch(self) -> list[Job]:
        with self._wake:
            batch, self._jobs = self._worker.take_batch(self._jobs, self._config.max_batch_tokens)
            self.queue_tokens -= sum(job.n_tokens for job in batch)
        return batch

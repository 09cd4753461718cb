"""How far a trainer is: its own steps and tokens, the run's tokens, and what is counted elsewhere meanwhile."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from node.trainer.token_counter import TokenCounter
from node.trainer.trunk_state import TrainingProgress

if TYPE_CHECKING:
    from dht.directory import Directory
    from node.trainer.dispatch.dispatcher import Dispatcher
    from node.trainer.train_step import StepResult, Training


class ProgressTracker:
    """The progress of trainer `own_id`, which trains to `steps`; with 0 until the run's last token."""

    def __init__(
        self, training: Training, dispatcher: Dispatcher, directory: Directory, own_id: str, steps: int
    ) -> None:
        self._training, self._dispatcher, self._directory = training, dispatcher, directory
        self._own_id, self._steps = own_id, steps
        self._total_tokens = training.manifest.optimizer.total_tokens
        self._started = time.monotonic()
        self.progress = TrainingProgress()
        self.tokens = TokenCounter(own_id)

    def resume(self, progress: TrainingProgress) -> None:
        """Count on from a checkpoint."""
        self.progress = progress
        self.tokens = TokenCounter(self._own_id, progress.own_tokens, progress.trainers, progress.run_tokens)

    @property
    def is_trained(self) -> bool:
        """Whether the last step, or the run's last token, is done."""
        if self._steps:
            return self.progress.step >= self._steps
        return self.progress.run_tokens >= self._total_tokens

    def observe_trainers(self) -> int:
        """Take in what the other trainers announce; how many are live, this one included."""
        peers = self._directory.peers()
        self.tokens.observe(peers)
        self.progress.run_tokens = self._training.run_tokens = self.tokens.total
        return 1 + sum(peer.role == "trainer" and peer.peer_id != self._own_id for peer in peers)

    def add(self, result: StepResult) -> None:
        """Count a step that the training has done."""
        progress = self.progress
        self.tokens.add(result.n_tokens)
        progress.step, progress.run_tokens = self._training.steps_done, self.tokens.total
        progress.train_seconds += result.seconds

    def expected_steps(self, n_trainers: int) -> int:
        """Return this trainer's steps in all, if every trainer goes on as fast as this one."""
        if self._steps:
            return self._steps
        left = max(0, self._total_tokens - self.progress.run_tokens)
        return self.progress.step - (-left // (self._training.tokens_per_step * n_trainers))

    def totals(self) -> TrainingProgress:
        """Progress with what is counted elsewhere while this process runs."""
        dispatcher, progress = self._dispatcher, self.progress
        return replace(
            progress,
            version=self._training.version,
            own_tokens=self.tokens.own,
            trainers=self.tokens.others,
            calls_ok=progress.calls_ok + dispatcher.calls_ok,
            calls_failed=progress.calls_failed + dispatcher.calls_failed,
            wire_bytes=progress.wire_bytes + dispatcher.client.wire_bytes,
            wall_s=progress.wall_s + time.monotonic() - self._started,
        )

"""A trainer's loop: evaluate, step by step train, save and evaluate from time to time, sample and report at the end."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from common.errors import CheckpointError, DivergedError
from node.model.next_token import GenerationConfig
from node.model.transformer import bits_per_byte
from node.trainer.sampling import SAMPLE_PROMPT, SAMPLE_TEMPERATURE, SAMPLE_TOKENS, sample_text
from node.trainer.trunk_state import FILE_NAME, save_trunk, stored_step

if TYPE_CHECKING:
    from node.trainer.config import TrainConfig
    from node.trainer.evaluator.evaluator import Evaluator
    from node.trainer.progress_tracker import ProgressTracker
    from node.trainer.train_step import Training
    from node.trainer.training_reports import TrainingReports
    from node.trainer.trunk_sharing import TrunkSharing

logger = logging.getLogger(__name__)

FINAL_EVALUATION_FACTOR = 4
NOT_STORED = "no state of before could be stored"
REMEDY = (
    "The usual remedy is a lower learning rate, which is optimizer.lr and optimizer.expert_lr in the run's manifest"
)


class TrainingLoop:
    """Belongs to the event loop, whose thread never computes: steps run on threads of their own."""

    def __init__(
        self,
        config: TrainConfig,
        training: Training,
        tracker: ProgressTracker,
        sharing: TrunkSharing,
        evaluator: Evaluator,
        reports: TrainingReports,
    ) -> None:
        self._config, self._training, self._tracker = config, training, tracker
        self._sharing, self._evaluator, self._reports = sharing, evaluator, reports

    async def run(self, stop: asyncio.Event) -> None:
        """Train to the last step.

        Raises:
            DrainingError: `stop` is set.
            DivergedError: the loss is no longer finite; a trunk of before is stored.
        """
        try:
            await self._run(stop)
        except DivergedError as error:
            raise DivergedError(await asyncio.to_thread(self._after_divergence, error)) from None

    async def _run(self, stop: asyncio.Event) -> None:
        config, progress = self._config, self._tracker.progress
        self._tracker.observe_trainers()
        self._reports.start(config.steps)
        if progress.bits_per_byte_start is None:
            progress.bits_per_byte_start = await self._evaluate(FINAL_EVALUATION_FACTOR)
        while not self._tracker.is_trained:
            await self._evaluator.after_step(await self._step(), stop)
            if progress.step % config.save_every == 0:
                await asyncio.to_thread(self.save)
            if config.eval_every and progress.step % config.eval_every == 0 and not self._tracker.is_trained:
                await self._evaluate(1)
        bits = await self._evaluate(FINAL_EVALUATION_FACTOR)
        text = await asyncio.to_thread(self._sample)
        self._reports.sample(text)
        await asyncio.to_thread(self.save)
        await asyncio.to_thread(self._reports.done, config.out, bits, text)

    def _after_divergence(self, error: DivergedError) -> str:
        """What to tell; a trunk that was stored before is better than today's, which leads to no finite loss."""
        if stored_step(self._config.out) is None and self._training.is_sound:
            self.save()
        step = stored_step(self._config.out)
        stored = f"the state after step {step} is in {self._config.out / FILE_NAME}" if step is not None else NOT_STORED
        return f"the training has diverged at step {self._tracker.progress.step + 1}: {error}; {stored}. {REMEDY}"

    def save(self) -> None:
        """A full disk is reported and does not stop the training."""
        try:
            with self._training.trunk_lock.turn():
                save_trunk(self._config.out, self._training, self._tracker.totals())
        except CheckpointError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says all, a stack trace would hide it
            self._reports.checkpoint_failed(error)

    async def _step(self) -> float:
        """Seconds that it took."""
        n_trainers = self._tracker.observe_trainers()
        self._training.rate_scale = self._sharing.rate_scale()
        wire_bytes = self._reports.wire_bytes
        result = await asyncio.to_thread(self._training.step)
        wire_bytes = self._reports.wire_bytes - wire_bytes
        self._tracker.add(result)
        self._reports.step(result, n_trainers, wire_bytes)
        return result.seconds

    async def _evaluate(self, factor: int) -> float:
        """Held-out bits per byte."""
        loss = await asyncio.to_thread(self._training.evaluate, self._config.eval_bytes * factor)
        self._reports.evaluation(loss)
        return bits_per_byte(loss, self._training.dataset.held_out_bytes_per_token)

    def _sample(self) -> str:
        training = self._training
        config = GenerationConfig(max_new_tokens=SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, seed=self._config.seed)
        with training.trunk_lock.turn():
            training.model.eval()
            return sample_text(training.model, training.dataset.tokenizer, SAMPLE_PROMPT, config, training.until_enough)

"""What a trainer reports while it trains: events at the start, after each step and evaluation, and the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.model.experts.kinds import expert_parameters
from node.model.transformer import bits_per_byte
from node.trainer.events import DoneEvent, EvalEvent, SampleEvent, StepEvent, TrunkCheckpointFailedEvent
from node.trainer.step_report import StepReport, step_event
from node.trainer.view.report import report_files, write_report
from protocol.manifest import TRUNK
from protocol.node_events import TrainingStartEvent

if TYPE_CHECKING:
    from pathlib import Path

    from common.errors import CheckpointError
    from common.events import EventLog
    from node.averaging.averager import Averager
    from node.membership.swarm import Swarm
    from node.trainer.dispatch.dispatcher import Dispatcher
    from node.trainer.progress_tracker import ProgressTracker
    from node.trainer.train_step import StepResult, Training


class TrainingReports:
    """Gathers them from the parts that know."""

    def __init__(
        self,
        swarm: Swarm,
        training: Training,
        dispatcher: Dispatcher,
        averager: Averager,
        tracker: ProgressTracker,
        events: EventLog,
    ) -> None:
        self._swarm, self._manifest, self._training = swarm, swarm.manifest, training
        self._dispatcher, self._averager, self._tracker, self._events = dispatcher, averager, tracker, events
        self._n_experts = self._manifest.model.experts_per_layer * self._manifest.model.n_layers

    def start(self, own_steps: int) -> None:
        """Training begins, to `own_steps` or, if 0, until the run's last token."""
        model, dataset = self._manifest.model, self._training.dataset
        view = self._swarm.directory.snapshot()
        steps = self._tracker.expected_steps(1)
        own_total = own_steps * self._training.tokens_per_step
        self._events.emit(
            TrainingStartEvent(
                run_id=self._manifest.run_id,
                experts=self._n_experts,
                hosts=len(view.load_by_peer()),
                step=self._tracker.progress.step,
                steps=steps,
                tokens_total=own_total or self._manifest.optimizer.total_tokens,
                parameters_trunk=sum(p.numel() for p in self._training.parameters),
                parameters_experts=expert_parameters(model),
                documents=dataset.index.train_documents,
                bytes_train=dataset.index.train_bytes,
            )
        )

    @property
    def wire_bytes(self) -> int:
        """Bytes of all calls to hosts so far."""
        return self._dispatcher.client.wire_bytes

    def step(self, result: StepResult, n_trainers: int, wire_bytes: int) -> None:
        """A step was done, whose calls took `wire_bytes`."""
        self._events.emit(self._step_event(result, n_trainers, wire_bytes))

    def evaluation(self, loss: float) -> None:
        """The trunk was evaluated; `loss` in nats per token."""
        progress, bits = self._tracker.progress, bits_per_byte(loss, self._training.dataset.held_out_bytes_per_token)
        self._events.emit(
            EvalEvent(
                step=progress.step, loss=round(loss, 5), bits_per_byte=round(bits, 4), run_tokens=progress.run_tokens
            )
        )

    def sample(self, text: str) -> None:
        """What the model writes at the end."""
        self._events.emit(SampleEvent(text=text))

    def checkpoint_failed(self, error: CheckpointError) -> None:
        """The trunk could not be written."""
        self._events.emit(TrunkCheckpointFailedEvent(reason=str(error)))

    def done(self, out: Path, bits: float, sample: str) -> None:
        """The end: the summary is written to folder `out`."""
        totals, corpus = self._tracker.totals(), self._training.dataset.corpus
        done = DoneEvent(
            run_id=self._manifest.run_id,
            experts=self._n_experts,
            hosts=len(self._swarm.directory.snapshot().load_by_peer()),
            trainers=self._tracker.tokens.n_trainers,
            steps=totals.step,
            tokens=totals.run_tokens,
            bits_per_byte_start=round(totals.bits_per_byte_start or 0.0, 4),
            bits_per_byte_end=round(bits, 4),
            tokens_per_s=round(totals.own_tokens / max(totals.train_seconds, 1e-9), 1),
            calls_failed=totals.calls_failed,
            wall_s=round(totals.wall_s, 1),
            own_tokens=totals.own_tokens,
            calls_ok=totals.calls_ok,
            wire_bytes=totals.wire_bytes,
            exchanged_bytes=self._averager.exchanged_bytes,
            train_s=round(totals.train_seconds, 1),
            sample=sample,
            attribution=corpus.attribution or corpus.title,
            files=tuple(map(str, report_files(out))),
            bytes_per_token=round(self._training.dataset.held_out_bytes_per_token, 4),
        )
        write_report(out, done)
        self._events.emit(done)

    def _step_event(self, result: StepResult, n_trainers: int, wire_bytes: int) -> StepEvent:
        dispatcher, averager = self._dispatcher, self._averager
        report = StepReport(
            result=result,
            progress=self._tracker.totals(),
            steps=self._tracker.expected_steps(n_trainers),
            experts_total=self._n_experts,
            trainers=n_trainers,
            staleness=dispatcher.take_staleness(),
            divergence=averager.divergence(TRUNK),
            exchanged_bytes=averager.exchanged_bytes,
            step_wire_bytes=wire_bytes,
            bytes_per_token=self._training.dataset.train_bytes_per_token,
        )
        gates = [layer.gate for layer in self._training.moe_layers]
        return step_event(report, gates, self._swarm.directory, dispatcher.take_pairs_by_peer())

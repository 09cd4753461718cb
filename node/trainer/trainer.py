"""Composition root of a trainer: swarm, data, trunk, training loop, evaluation, checkpoints, display and report."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from common.allocator import keep_freed_memory
from common.errors import CheckpointError, ConfigError, DrainingError, UnavailableError
from common.events import EventLog
from common.folders import data_cache, prepare_folder
from common.settings import check_minimums
from common.tasks import until_stopped
from dht.announcer import Announcement, Announcer
from node.data import open_dataset
from node.membership.endpoint import NodeEndpoint
from node.membership.swarm import Swarm
from node.model.devices import pick_device
from node.model.experts.kinds import expert_parameters
from node.rpc.health import server_told
from node.trainer.dispatch.dispatcher import DispatchConfig, dispatch_over
from node.trainer.evaluator.evaluation_service import SERVICE_NAME as EVALUATION
from node.trainer.evaluator.evaluation_service import EvaluationService
from node.trainer.evaluator.evaluator import Evaluator, EvaluatorParts
from node.trainer.evaluator.offers import OfferQueue
from node.trainer.events import (
    DoneEvent,
    EvalEvent,
    RetryEvent,
    SampleEvent,
    StepEvent,
    StoppedEvent,
    TrunkCheckpointFailedEvent,
    WaitingEvent,
)
from node.trainer.sampling import SAMPLE_BYTES, SAMPLE_PROMPT, sample_text
from node.trainer.step_report import StepReport, step_event
from node.trainer.swarm_client import wait_for_blocks
from node.trainer.token_counter import TokenCounter
from node.trainer.train_step import StepConfig, Training, build_model
from node.trainer.trunk_sharing import TrunkSharing
from node.trainer.trunk_state import TrainingProgress, load_trunk, save_trunk
from node.trainer.view.display import open_display
from node.trainer.view.report import report_files, write_report
from protocol.announcements import PeerRecord
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.manifest import TRUNK, all_blocks
from protocol.node_events import TrainingStartEvent
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    from common.errors import TooFewExpertsError
    from node.data import ByteDataset
    from node.trainer.config import TrainConfig
    from node.trainer.train_step import StepResult

logger = logging.getLogger(__name__)

MINIMUMS = {
    "steps": 0,
    "batch": 1,
    "micro_batches": 1,
    "in_flight": 0,
    "shard": 0,
    "n_shards": 1,
    "port": 0,
    "wait_for_blocks_s": 0,
    "k_min": 1,
    "call_timeout_s": 0.1,
    "eval_every": 0,
    "eval_bytes": 1,
    "save_every": 1,
    "threads": 1,
    "join_timeout_s": 0.1,
}
FINAL_EVALUATION_FACTOR = 4
WAIT_FOR_CHANGE_S = 1.0


async def run_trainer(config: TrainConfig, stop: asyncio.Event) -> None:
    """Train until the last step or `stop`; saves the trunk either way. Raises a KilohiveError if it cannot start."""
    check_minimums(config, MINIMUMS)
    if config.shard >= config.n_shards:
        raise ConfigError(f"--shard: must be below --n-shards {config.n_shards}, is {config.shard}")
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    prepare_folder(config.out)
    identity = Identity.load_or_create(config.out / "identity.key")
    events = EventLog(config.out / "events.jsonl")
    swarm = Swarm(config, identity)
    try:
        await until_stopped(swarm.join(), stop)
        swarm.dht.on_lost(stop.set)
        dataset = await asyncio.to_thread(_open_data, config, swarm.manifest.seed)
        with open_display(events, plain=config.plain):
            trainer = Trainer(config, swarm, dataset, events)
            await trainer.run(stop)
        swarm.dht.raise_if_lost()
    finally:
        await swarm.leave()
        events.close()


def _open_data(config: TrainConfig, seed: int) -> ByteDataset:
    return open_dataset(config.data, cache_dir=data_cache(), seed=seed)


class Trainer:
    """One trainer, of several perhaps. The event loop's thread never computes: steps run on threads of their own."""

    def __init__(self, config: TrainConfig, swarm: Swarm, dataset: ByteDataset, events: EventLog) -> None:
        self._config, self._swarm, self._events = config, swarm, events
        self._manifest = swarm.manifest
        self._dispatcher = dispatch_over(
            swarm,
            DispatchConfig(
                call_timeout_s=config.call_timeout_s, k_min=config.k_min, seed=config.seed, hedge=config.hedge
            ),
        )
        self._training = self._build(dataset)
        self._node_endpoint = NodeEndpoint(swarm, events)
        offers = OfferQueue(time.monotonic)
        peer_id, peers = swarm.identity.peer_id, swarm.directory.peers
        services = {EVALUATION: EvaluationService(self._manifest, peer_id, offers, peers).handler()}
        self._sharing = TrunkSharing(config, swarm, self._training, events, self._node_endpoint, services)
        self._evaluator = self._build_evaluator(offers)
        self._progress = TrainingProgress()
        self._tokens = TokenCounter(swarm.identity.peer_id)
        self._n_experts = self._manifest.model.experts_per_layer * self._manifest.model.n_layers
        self._started, self._started_at = time.monotonic(), time.time()

    async def run(self, stop: asyncio.Event) -> None:
        """Join the other trainers, evaluate, train, evaluate, report; on `stop`, save and return."""
        self._resume()
        announcer = Announcer(self._swarm.dht, self._swarm.identity, self._swarm.admission, describe=self._describe)
        try:
            # Announced only with a trunk that is worth averaging with.
            await until_stopped(self._sharing.join(), stop)
            address = Address(self._swarm.identity.peer_id, self._sharing.server_endpoint)
            with server_told(self._config.out, address, admission=self._swarm.admission):
                await announcer.start()
                work = asyncio.create_task(self._work(stop), name="training")
                watching = asyncio.create_task(self._node_endpoint.watch(announcer), name="endpoint")
                try:
                    await self._until_done_or(stop, work)
                finally:
                    watching.cancel()
                await self._finish(work)
        finally:
            self._dispatcher.close()
            await asyncio.gather(announcer.withdraw(), self._sharing.stop())
            await asyncio.to_thread(self._training.close)

    async def _until_done_or(self, stop: asyncio.Event, work: asyncio.Task[None]) -> None:
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if not work.done():
            # Releases the compute threads: whatever they wait for raises DrainingError.
            self._dispatcher.close()

    async def _finish(self, work: asyncio.Task[None]) -> None:
        try:
            await work
        except DrainingError:
            await asyncio.to_thread(self._save)
            self._events.emit(StoppedEvent(step=self._progress.step))
            logger.info("Stopped after step %d; the same command with --resume goes on", self._progress.step)

    async def _work(self, stop: asyncio.Event) -> None:
        config, progress = self._config, self._progress
        await until_stopped(self._sharing.catch_up(), stop)
        await self._wait_for_all_blocks(stop)
        self._observe_trainers()
        self._emit_start()
        if progress.bits_per_byte_start is None:
            progress.bits_per_byte_start = await self._evaluate(FINAL_EVALUATION_FACTOR)
        while not self._trained:
            await self._evaluator.after_step(await self._step(), stop)
            if progress.step % config.save_every == 0:
                await asyncio.to_thread(self._save)
            if config.eval_every and progress.step % config.eval_every == 0 and not self._trained:
                await self._evaluate(1)
        bits_per_byte = await self._evaluate(FINAL_EVALUATION_FACTOR)
        text = await asyncio.to_thread(self._sample)
        self._events.emit(SampleEvent(text=text))
        await asyncio.to_thread(self._save)
        await asyncio.to_thread(self._report, bits_per_byte, text)

    @property
    def _trained(self) -> bool:
        if self._config.steps:
            return self._progress.step >= self._config.steps
        return self._progress.run_tokens >= self._manifest.optimizer.total_tokens

    def _observe_trainers(self) -> int:
        """Take in what the other trainers say; how many are live, this one included."""
        peers = self._swarm.directory.peers()
        self._tokens.observe(peers)
        self._progress.run_tokens = self._training.run_tokens = self._tokens.total
        own_id = self._swarm.identity.peer_id
        return 1 + sum(peer.role == "trainer" and peer.peer_id != own_id for peer in peers)

    async def _step(self) -> float:
        """Seconds that it took."""
        n_trainers = self._observe_trainers()
        self._training.rate_scale = self._sharing.rate_scale()
        wire_bytes = self._dispatcher.client.wire_bytes
        result = await asyncio.to_thread(self._training.step)
        wire_bytes = self._dispatcher.client.wire_bytes - wire_bytes
        progress, training = self._progress, self._training
        self._tokens.add(result.n_tokens)
        progress.step, progress.run_tokens = training.steps_done, self._tokens.total
        progress.train_seconds += result.seconds
        self._events.emit(self._step_event(result, n_trainers, wire_bytes))
        return result.seconds

    def _step_event(self, result: StepResult, n_trainers: int, wire_bytes: int) -> StepEvent:
        dispatcher, averager = self._dispatcher, self._sharing.averaging.averager
        report = StepReport(
            result=result,
            progress=self._totals(),
            steps=self._expected_steps(n_trainers),
            experts_total=self._n_experts,
            trainers=n_trainers,
            staleness=dispatcher.take_staleness(),
            divergence=averager.divergence(TRUNK),
            exchanged_bytes=averager.exchanged_bytes,
            step_wire_bytes=wire_bytes,
        )
        gates = [layer.gate for layer in self._training.moe_layers]
        return step_event(report, gates, self._swarm.directory, dispatcher.take_pairs_by_peer())

    def _expected_steps(self, n_trainers: int) -> int:
        """Of this trainer, in all, if every trainer goes on as fast as this one."""
        if self._config.steps:
            return self._config.steps
        left = max(0, self._manifest.optimizer.total_tokens - self._progress.run_tokens)
        return self._progress.step - (-left // (self._training.tokens_per_step * n_trainers))

    async def _evaluate(self, factor: int) -> float:
        bits_per_byte = await asyncio.to_thread(self._training.evaluate, self._config.eval_bytes * factor)
        step, run_tokens = self._progress.step, self._progress.run_tokens
        self._events.emit(EvalEvent(step=step, bits_per_byte=round(bits_per_byte, 4), run_tokens=run_tokens))
        return bits_per_byte

    def _build(self, dataset: ByteDataset) -> Training:
        config, manifest = self._config, self._manifest
        generator = torch.Generator().manual_seed(manifest.seed)
        model = build_model(manifest, self._dispatcher, generator).to(pick_device(config.device))
        steps = StepConfig(
            batch=config.batch,
            micro_batches=config.micro_batches,
            in_flight=config.in_flight,
            shard=config.shard,
            n_shards=config.n_shards,
            seed=config.seed,
        )
        return Training(manifest, model, self._dispatcher, dataset, steps, self._wait_for_experts)

    def _build_evaluator(self, offers: OfferQueue) -> Evaluator:
        parts = EvaluatorParts(
            identity=self._swarm.identity,
            training=self._training,
            experts=self._dispatcher,
            client=self._sharing.averaging.client,
            replicas=self._swarm.directory.replicas,
            events=self._events,
            out=self._config.out,
        )
        return Evaluator(parts, offers)

    def _resume(self) -> None:
        training, config = self._training, self._config
        stored = load_trunk(config.out, training) if config.resume else None
        if stored is None and not config.resume and (config.out / "trunk.safetensors").exists():
            raise ConfigError(f"{config.out} holds a trained trunk: add --resume to go on, or choose another --out")
        self._progress = progress = stored or TrainingProgress()
        own_id = self._swarm.identity.peer_id
        self._tokens = TokenCounter(own_id, progress.own_tokens, progress.trainers, progress.run_tokens)

    def _totals(self) -> TrainingProgress:
        """Progress with what is counted elsewhere while this process runs."""
        dispatcher, progress = self._dispatcher, self._progress
        return replace(
            progress,
            version=self._training.version,
            own_tokens=self._tokens.own,
            trainers=self._tokens.others,
            calls_ok=progress.calls_ok + dispatcher.calls_ok,
            calls_failed=progress.calls_failed + dispatcher.calls_failed,
            wire_bytes=progress.wire_bytes + self._dispatcher.client.wire_bytes,
            wall_s=progress.wall_s + time.monotonic() - self._started,
        )

    def _save(self) -> None:
        """A full disk is reported and does not stop the training."""
        try:
            with self._training.trunk_lock.turn():
                save_trunk(self._config.out, self._training, self._totals())
        except CheckpointError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says all, a stack trace would hide it
            self._events.emit(TrunkCheckpointFailedEvent(reason=str(error)))

    def _sample(self) -> str:
        model, seed = self._training.model, self._config.seed
        with self._training.trunk_lock.turn():
            model.eval()
            return self._training.until_enough(
                lambda prompt: sample_text(model, prompt, SAMPLE_BYTES, 0.8, seed), SAMPLE_PROMPT
            )

    def _report(self, bits_per_byte: float, sample: str) -> None:
        totals, out, corpus = self._totals(), self._config.out, self._training.dataset.corpus
        done = DoneEvent(
            run_id=self._manifest.run_id,
            experts=self._n_experts,
            hosts=len(self._swarm.directory.snapshot().load_by_peer()),
            trainers=self._tokens.n_trainers,
            steps=totals.step,
            tokens=totals.run_tokens,
            bits_per_byte_start=round(totals.bits_per_byte_start or 0.0, 4),
            bits_per_byte_end=round(bits_per_byte, 4),
            tokens_per_s=round(totals.own_tokens / max(totals.train_seconds, 1e-9), 1),
            calls_failed=totals.calls_failed,
            wall_s=round(totals.wall_s, 1),
            own_tokens=totals.own_tokens,
            calls_ok=totals.calls_ok,
            wire_bytes=totals.wire_bytes,
            exchanged_bytes=self._sharing.averaging.averager.exchanged_bytes,
            train_s=round(totals.train_seconds, 1),
            sample=sample,
            attribution=corpus.attribution or corpus.title,
            files=tuple(map(str, report_files(out))),
        )
        write_report(out, done)
        self._events.emit(done)

    def _emit_start(self) -> None:
        model, dataset = self._manifest.model, self._training.dataset
        own_total = self._config.steps * self._training.tokens_per_step
        self._events.emit(
            TrainingStartEvent(
                run_id=self._manifest.run_id,
                experts=self._n_experts,
                hosts=len(self._swarm.directory.snapshot().load_by_peer()),
                step=self._progress.step,
                steps=self._expected_steps(1),
                tokens_total=own_total or self._manifest.optimizer.total_tokens,
                parameters_trunk=sum(p.numel() for p in self._training.parameters),
                parameters_experts=expert_parameters(model),
                documents=dataset.index.train_documents,
                bytes_train=dataset.index.train_bytes,
            )
        )

    async def _wait_for_all_blocks(self, stop: asyncio.Event) -> None:
        """Give every block the time to find a host; then begin with those that did."""
        directory = self._swarm.directory
        if directory.snapshot().lost_blocks():
            self._emit_waiting("")
            with contextlib.suppress(UnavailableError):
                await until_stopped(wait_for_blocks(directory, self._config.wait_for_blocks_s), stop)

    def _emit_waiting(self, why: str) -> None:
        lost = len(self._swarm.directory.snapshot().lost_blocks())
        total = len(all_blocks(self._manifest.model))
        self._events.emit(WaitingEvent(for_=f"hosts: {lost} of {total} blocks have no live replica{why}"))

    def _wait_for_experts(self, error: TooFewExpertsError) -> None:
        """Called on a compute thread; returns when it is worth trying again, raises DrainingError when leaving."""
        if error.failed_peers:
            # They are avoided from now on: the gate chooses among the others at once.
            self._events.emit(RetryEvent(step=self._progress.step + 1, reason=str(error)))
            return
        self._emit_waiting(f" ({error})")
        self._dispatcher.wait_for_change(WAIT_FOR_CHANGE_S)

    def _describe(self) -> Announcement:
        seconds, tokens = self._progress.train_seconds, self._tokens.own
        peer = PeerRecord(
            role="trainer",
            endpoint=self._node_endpoint.endpoint,
            software=SOFTWARE,
            started_s=self._started_at,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            run_tokens=self._tokens.total,
            own_tokens=tokens,
            exchanged_bytes=self._sharing.averaging.averager.exchanged_bytes,
            reachability=self._node_endpoint.state,
        )
        return Announcement(peer=peer, blocks=(self._sharing.record(),))

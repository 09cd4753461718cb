"""Composition root of a trainer: swarm, data, trunk, training loop, evaluation, checkpoints, display and report."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from common.allocator import keep_freed_memory
from common.assets import asset_store
from common.config import EVENT_LOG_MINIMUMS
from common.errors import ConfigError, DrainingError
from common.events import EventLog
from common.folders import FolderClaim, claimed, data_cache
from common.metrics import serve_metrics
from common.settings import check_minimums
from common.tasks import until_stopped
from dht.announcer import Announcement, Announcer
from node.data import open_dataset
from node.membership.endpoint import NodeEndpoint
from node.membership.swarm import Swarm
from node.model.devices import pick_device
from node.rpc.health import server_told
from node.trainer.asset_service import SERVICE_NAME as ASSETS
from node.trainer.asset_service import AssetService
from node.trainer.credit.trainer_credit import TrainerCredit
from node.trainer.dispatch.dispatcher import DispatchConfig, dispatch_over
from node.trainer.evaluator.evaluation_service import SERVICE_NAME as EVALUATION
from node.trainer.evaluator.evaluation_service import EvaluationService
from node.trainer.evaluator.evaluator import Evaluator
from node.trainer.evaluator.offer_count import OfferCount
from node.trainer.evaluator.offers import OfferQueue
from node.trainer.evaluator.trial_builder import TrialBuilder
from node.trainer.events import LeftOutEvent, StoppedEvent
from node.trainer.host_wait import HostWait
from node.trainer.paused_hosts import PausedHosts
from node.trainer.progress_tracker import ProgressTracker
from node.trainer.run_files import fetch_tokenizer
from node.trainer.train_step import StepConfig, Training, build_model
from node.trainer.training_loop import TrainingLoop
from node.trainer.training_reports import TrainingReports
from node.trainer.trunk_sharing import TrunkSharing
from node.trainer.trunk_state import load_trunk
from node.trainer.view.display import open_display
from node.trainer.view.metrics import TrainerCollector
from node.trainer.view.report import keep_curve
from node.trainer.view.run_report import RunReport
from protocol.announcements import PeerRecord
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.profile import chosen_profile
from protocol.receipts import CREDIT_SERVICE
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    from common.tokenizer import Tokenizer
    from node.data import TextDataset
    from node.trainer.config import TrainConfig

logger = logging.getLogger(__name__)

MAX_NAMES_TOLD = 100
LAST_CLAIMS_S, STOPPED_S = 5.0, 1.0
"""How long hosts have to sign for the last minute: at the end, and when a person waits for the stop."""

MINIMUMS = {
    "steps": 0,
    "batch": 1,
    "micro_batches": 1,
    "in_flight": 0,
    "shard": 0,
    "n_shards": 1,
    "port": 0,
    "metrics_port": 0,
    "wait_for_blocks_s": 0,
    "k_min": 1,
    "call_timeout_s": 0.1,
    "eval_every": 0,
    "eval_bytes": 1,
    "save_every": 1,
    "threads": 1,
    "join_timeout_s": 0.1,
    **EVENT_LOG_MINIMUMS,
}


async def run_trainer(config: TrainConfig, stop: asyncio.Event) -> None:
    """Train until the last step or `stop`; saves the trunk either way. Raises a KilohiveError if it cannot start."""
    check_minimums(config, MINIMUMS)
    if config.shard >= config.n_shards:
        raise ConfigError(f"--shard: must be below --n-shards {config.n_shards}, is {config.shard}")
    chosen_profile(config.name, config.team, time.time())  # a mistake in it is told before anything is started
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    with claimed(FolderClaim(folder=config.out, role="train", flag="--out")):
        await _train(config, stop)


async def _train(config: TrainConfig, stop: asyncio.Event) -> None:
    identity = Identity.load_or_create(config.out / "identity.key")
    events, report = _open_log(config), RunReport()
    events.subscribe(report.on_event)
    try:
        while await _train_at_one_address(config, Swarm(config, identity, config, config.out), events, report, stop):
            config = replace(config, resume=True)
    finally:
        events.close()


async def _train_at_one_address(
    config: TrainConfig, swarm: Swarm, events: EventLog, report: RunReport, stop: asyncio.Event
) -> bool:
    """Train to the end or `stop`; whether this machine's address has changed instead, and it is to join again."""
    try:
        await until_stopped(swarm.join(), stop)
        swarm.dht.on_lost(stop.set)
        tokenizer = await fetch_tokenizer(swarm, config.tokenizer, config.join_timeout_s, stop)
        dataset = await asyncio.to_thread(_open_data, config, swarm.manifest.seed, tokenizer)
        _tell_left_out(dataset, events)
        watch = swarm.address_watch()
        async with watch.stopping(stop) as ended:
            collector = TrainerCollector()
            events.subscribe(collector.on_event)
            metrics = serve_metrics(collector, swarm.listen, config.metrics_port, setting="metrics_port")
            with metrics, open_display(events, plain=config.plain):
                await Trainer(config, swarm, dataset, events, report).run(ended)
            moved = bool(watch.moved_to) and ended.is_set()
        swarm.dht.raise_if_lost()
        watch.raise_if_lost()
        return moved and not stop.is_set()
    finally:
        await swarm.leave()


def _open_log(config: TrainConfig) -> EventLog:
    path = config.out / "events.jsonl"
    return EventLog(
        path,
        max_bytes=config.event_log_bytes,
        n_files=config.event_log_files,
        before_drop=partial(keep_curve, path),
    )


def _open_data(config: TrainConfig, seed: int, tokenizer: Tokenizer) -> TextDataset:
    return open_dataset(config.data, cache_dir=data_cache(), seed=seed, strict=config.strict, tokenizer=tokenizer)


def _tell_left_out(dataset: TextDataset, events: EventLog) -> None:
    files, index = dataset.corpus.left_out, dataset.index
    if files or index.skipped_rows:
        names = tuple(map(str, files[:MAX_NAMES_TOLD]))
        rows, first = index.skipped_rows, index.first_skipped_row
        events.emit(LeftOutEvent(files=len(files), names=names, rows=rows, first_row=first))


class Trainer:
    """One trainer, of several perhaps. The event loop's thread never computes: steps run on threads of their own."""

    def __init__(
        self, config: TrainConfig, swarm: Swarm, dataset: TextDataset, events: EventLog, report: RunReport
    ) -> None:
        self._config, self._swarm, self._events, self._report = config, swarm, events, report
        self._manifest = swarm.manifest
        self._dispatcher = dispatch_over(
            swarm,
            DispatchConfig(
                call_timeout_s=config.call_timeout_s, k_min=config.k_min, seed=config.seed, hedge=config.hedge
            ),
        )
        self._host_wait = HostWait(swarm, self._dispatcher, lambda: self._tracker.progress.step, events)
        self._training = self._build(dataset)
        self._node_endpoint = NodeEndpoint(swarm, events)
        offers = OfferQueue(time.monotonic)
        peer_id, peers = swarm.identity.peer_id, swarm.directory.peers
        self._credit = TrainerCredit(config, swarm, self._dispatcher)
        services = {
            CREDIT_SERVICE: self._credit.handler(),
            EVALUATION: EvaluationService(self._manifest, peer_id, offers, peers).handler(),
            ASSETS: AssetService(self._manifest, asset_store()).handler(),
        }
        self._sharing = TrunkSharing(config, swarm, self._training, events, self._node_endpoint, services)
        self._tracker = ProgressTracker(self._training, self._dispatcher, swarm.directory, peer_id, config.steps)
        self._loop = self._build_loop(offers)
        self._started_at = time.time()

    async def run(self, stop: asyncio.Event) -> None:
        """Join the other trainers, evaluate, train, evaluate, report; on `stop`, save and return."""
        self._resume()
        announcer = Announcer(self._swarm.dht, self._swarm.identity, self._swarm.admission, describe=self._describe)
        try:
            await self._credit.open()
            # Announced only with a trunk that is worth averaging with.
            await until_stopped(self._sharing.join(), stop)
            address = Address(self._swarm.identity.peer_id, self._sharing.server_endpoint)
            with server_told(self._config.out, address, admission=self._swarm.admission):
                await announcer.start()
                work = asyncio.create_task(self._work(stop), name="training")
                paused_hosts = PausedHosts(self._swarm.directory, self._events)
                watches = (self._node_endpoint.watch(announcer), paused_hosts.watch(), self._credit.keep())
                watching = [asyncio.create_task(watch, name="watch") for watch in watches]
                try:
                    await self._until_done_or(stop, work)
                finally:
                    for task in watching:
                        task.cancel()
                await self._finish(work)
        finally:
            self._dispatcher.close()
            await self._credit.finish(STOPPED_S if stop.is_set() else LAST_CLAIMS_S)
            await asyncio.gather(announcer.withdraw(), self._sharing.stop())
            await asyncio.to_thread(self._training.close)

    async def _work(self, stop: asyncio.Event) -> None:
        await until_stopped(self._sharing.catch_up(), stop)
        await self._host_wait.for_all_blocks(self._config.wait_for_blocks_s, stop)
        await self._loop.run(stop)

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
            await asyncio.to_thread(self._loop.save)
            self._events.emit(StoppedEvent(step=self._tracker.progress.step))
            logger.info("Stopped after step %d; the same command with --resume goes on", self._tracker.progress.step)

    def _build(self, dataset: TextDataset) -> Training:
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
        return Training(manifest, model, self._dispatcher, dataset, steps, self._host_wait.for_experts)

    def _build_loop(self, offers: OfferQueue) -> TrainingLoop:
        training, averager, evaluator = self._training, self._sharing.averaging.averager, self._build_evaluator(offers)
        reports = TrainingReports(self._swarm, training, self._dispatcher, averager, self._tracker, self._events)
        return TrainingLoop(self._config, training, self._tracker, self._sharing, evaluator, reports)

    def _build_evaluator(self, offers: OfferQueue) -> Evaluator:
        swarm, client = self._swarm, self._sharing.averaging.client
        trials = TrialBuilder(self._training, self._dispatcher, client, swarm.directory.replicas)
        count = OfferCount(self._config.out, self._manifest.run_id)
        return Evaluator(offers, trials, count, swarm.identity, self._events)

    def _resume(self) -> None:
        training, config = self._training, self._config
        stored = load_trunk(config.out, training) if config.resume else None
        if stored is None and not config.resume and (config.out / "trunk.safetensors").exists():
            raise ConfigError(f"{config.out} holds a trained trunk: add --resume to go on, or choose another --out")
        if stored is not None:
            self._tracker.resume(stored)

    def _describe(self) -> Announcement:
        seconds, tokens = self._tracker.progress.train_seconds, self._tracker.tokens.own
        peer = PeerRecord(
            role="trainer",
            endpoint=self._node_endpoint.endpoint,
            software=SOFTWARE,
            started_s=self._started_at,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            run_tokens=self._tracker.tokens.total,
            own_tokens=tokens,
            exchanged_bytes=self._sharing.averaging.averager.exchanged_bytes,
            reachability=self._node_endpoint.state,
        )
        return Announcement(peer=peer, blocks=(self._sharing.record(),), report=self._report.latest)

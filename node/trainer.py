"""Composition root of a trainer: swarm, data, trunk, training loop, evaluation, checkpoints, display and report."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import torch

from dht.announcer import Announcement, Announcer
from node.data import open_dataset
from node.devices import pick_device
from node.dispatch.dispatcher import DispatchConfig
from node.display import open_display
from node.experts.kinds import expert_parameters
from node.folders import data_cache, prepare_folder
from node.moe import RemoteMoE
from node.progress import StepReport, step_event
from node.report import Summary, write_report
from node.sampling import SAMPLE_BYTES, SAMPLE_PROMPT, sample_text
from node.swarm import Swarm, until_stopped, wait_for_blocks
from node.training import StepConfig, Training, build_trunk
from node.trunk_state import Progress, load_trunk, save_trunk
from protocol.announcements import PeerRecord
from protocol.errors import CheckpointError, ConfigError, DrainingError, UnavailableError
from protocol.events import EventLog
from protocol.identity import Identity
from protocol.manifest import all_blocks
from protocol.settings import check_minimums
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    from node.config import TrainConfig
    from node.data import ByteDataset
    from protocol.errors import TooFewExpertsError

logger = logging.getLogger(__name__)

MINIMUMS = {
    "steps": 0,
    "batch": 1,
    "micro_batches": 1,
    "shard": 0,
    "n_shards": 1,
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
    prepare_folder(config.out)
    identity = Identity.load_or_create(config.out / "identity.key")
    events = EventLog(config.out / "events.jsonl")
    swarm = Swarm(config, identity)
    try:
        await until_stopped(swarm.join(), stop)
        dataset = await asyncio.to_thread(_open_data, config, swarm.manifest.seed)
        with open_display(events, plain=config.plain):
            trainer = Trainer(config, swarm, dataset, events)
            await trainer.run(stop)
    finally:
        await swarm.leave()
        events.close()


def _open_data(config: TrainConfig, seed: int) -> ByteDataset:
    return open_dataset(config.data, cache_dir=data_cache(), seed=seed)


class Trainer:
    """The training loop over a swarm. The loop's thread never computes: steps run on their own threads."""

    def __init__(self, config: TrainConfig, swarm: Swarm, dataset: ByteDataset, events: EventLog) -> None:
        self._config, self._swarm, self._events = config, swarm, events
        self._manifest = swarm.manifest
        self._dispatcher = swarm.dispatch(
            DispatchConfig(call_timeout_s=config.call_timeout_s, k_min=config.k_min, seed=config.seed)
        )
        self._training = self._build(dataset)
        self._progress = Progress()
        self._steps = 0
        self._n_experts = self._manifest.model.experts_per_layer * self._manifest.model.n_layers
        self._started, self._started_at = time.monotonic(), time.time()

    async def run(self, stop: asyncio.Event) -> None:
        """Evaluate, train, evaluate, report; on `stop`, save and return."""
        self._resume()
        announcer = Announcer(self._swarm.dht, self._swarm.identity, self._manifest.run_id, describe=self._describe)
        await announcer.start()
        work = asyncio.create_task(self._work(stop), name="training")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                # Releases the compute threads: whatever they wait for raises DrainingError.
                self._dispatcher.close()
            await self._finish(work)
        finally:
            self._dispatcher.close()
            stopping.cancel()
            await announcer.withdraw()
            await asyncio.to_thread(self._training.close)

    async def _finish(self, work: asyncio.Task[None]) -> None:
        try:
            await work
        except DrainingError:
            await asyncio.to_thread(self._save)
            self._events.emit("stopped", step=self._progress.step)
            logger.info("Stopped after step %d; the same command with --resume goes on", self._progress.step)

    async def _work(self, stop: asyncio.Event) -> None:
        config, progress = self._config, self._progress
        await self._wait_for_all_blocks(stop)
        self._emit_start()
        if progress.bits_per_byte_start is None:
            progress.bits_per_byte_start = await self._evaluate(FINAL_EVALUATION_FACTOR)
        while progress.step < self._steps:
            await self._step()
            if progress.step % config.save_every == 0:
                await asyncio.to_thread(self._save)
            if config.eval_every and progress.step % config.eval_every == 0 and progress.step < self._steps:
                await self._evaluate(1)
        bits_per_byte = await self._evaluate(FINAL_EVALUATION_FACTOR)
        text = await asyncio.to_thread(self._sample)
        self._events.emit("sample", text=text)
        await asyncio.to_thread(self._save)
        await asyncio.to_thread(self._report, bits_per_byte, text)

    async def _step(self) -> None:
        result = await asyncio.to_thread(self._training.step)
        progress, dispatcher = self._progress, self._dispatcher
        progress.step, progress.run_tokens = self._training.steps_done, self._training.run_tokens
        progress.train_seconds += result.seconds
        report = StepReport(
            result=result,
            progress=progress,
            steps=self._steps,
            calls=(progress.calls_ok + dispatcher.calls_ok, progress.calls_failed + dispatcher.calls_failed),
            wire_bytes=progress.wire_bytes + self._swarm.client.wire_bytes,
            experts_total=self._n_experts,
        )
        gates = [layer.gate for layer in self._training.moe_layers]
        pairs = dispatcher.take_pairs_by_peer()
        self._events.emit("step", **step_event(report, gates, self._swarm.directory, pairs))

    async def _evaluate(self, factor: int) -> float:
        bits_per_byte = await asyncio.to_thread(self._training.evaluate, self._config.eval_bytes * factor)
        step, run_tokens = self._progress.step, self._progress.run_tokens
        self._events.emit("eval", step=step, bits_per_byte=round(bits_per_byte, 4), run_tokens=run_tokens)
        return bits_per_byte

    def _build(self, dataset: ByteDataset) -> Training:
        config, manifest = self._config, self._manifest
        generator = torch.Generator().manual_seed(manifest.seed)
        layers = [RemoteMoE(self._dispatcher, layer, generator) for layer in range(manifest.model.n_layers)]
        model = build_trunk(manifest, layers, generator).to(pick_device(config.device))
        steps = StepConfig(
            batch=config.batch,
            micro_batches=config.micro_batches,
            shard=config.shard,
            n_shards=config.n_shards,
            seed=config.seed,
        )
        return Training(manifest, model, self._dispatcher, dataset, steps, self._wait_for_experts)

    def _resume(self) -> None:
        training, config = self._training, self._config
        stored = load_trunk(config.out, training) if config.resume else None
        if stored is None and not config.resume and (config.out / "trunk.safetensors").exists():
            raise ConfigError(f"{config.out} holds a trained trunk: add --resume to go on, or choose another --out")
        self._progress = stored or Progress()
        self._steps = config.steps or -(-self._manifest.optimizer.total_tokens // training.tokens_per_step)

    def _save(self) -> None:
        """A full disk is reported and does not stop the training."""
        dispatcher, progress = self._dispatcher, self._progress
        totals = Progress(
            step=progress.step,
            run_tokens=progress.run_tokens,
            bits_per_byte_start=progress.bits_per_byte_start,
            calls_ok=progress.calls_ok + dispatcher.calls_ok,
            calls_failed=progress.calls_failed + dispatcher.calls_failed,
            wire_bytes=progress.wire_bytes + self._swarm.client.wire_bytes,
            train_seconds=progress.train_seconds,
            wall_s=progress.wall_s + time.monotonic() - self._started,
        )
        try:
            save_trunk(self._config.out, self._training, totals)
        except CheckpointError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says all, a stack trace would hide it
            self._events.emit("checkpoint_failed", reason=str(error))

    def _sample(self) -> str:
        model, seed = self._training.model, self._config.seed
        model.eval()
        return self._training.until_enough(
            lambda prompt: sample_text(model, prompt, SAMPLE_BYTES, 0.8, seed), SAMPLE_PROMPT
        )

    def _report(self, bits_per_byte: float, sample: str) -> None:
        progress, swarm = self._progress, self._swarm
        summary = Summary(
            run_id=self._manifest.run_id,
            experts=self._n_experts,
            hosts=len(swarm.directory.snapshot().load_by_peer()),
            trainers=1,
            steps=progress.step,
            tokens=progress.run_tokens,
            bits_per_byte_start=round(progress.bits_per_byte_start or 0.0, 4),
            bits_per_byte_end=round(bits_per_byte, 4),
            tokens_per_s=round(progress.run_tokens / max(progress.train_seconds, 1e-9), 1),
            calls_failed=progress.calls_failed + self._dispatcher.calls_failed,
            wall_s=round(progress.wall_s + time.monotonic() - self._started, 1),
        )
        extras: dict[str, object] = {
            "calls_ok": progress.calls_ok + self._dispatcher.calls_ok,
            "wire_bytes": progress.wire_bytes + swarm.client.wire_bytes,
            "train_s": round(progress.train_seconds, 1),
        }
        corpus = self._training.dataset.corpus
        attribution = corpus.attribution or corpus.title
        self._events.emit(
            "done", **write_report(self._config.out, summary, extras, sample=sample, attribution=attribution)
        )

    def _emit_start(self) -> None:
        model, dataset = self._manifest.model, self._training.dataset
        view = self._swarm.directory.snapshot()
        self._events.emit(
            "start",
            run_id=self._manifest.run_id,
            experts=self._n_experts,
            hosts=len(view.load_by_peer()),
            step=self._progress.step,
            steps=self._steps,
            tokens_total=self._steps * self._training.tokens_per_step,
            parameters_trunk=sum(p.numel() for p in self._training.parameters),
            parameters_experts=expert_parameters(model),
            documents=dataset.index.train_documents,
            bytes_train=dataset.index.train_bytes,
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
        self._events.emit("waiting", **{"for": f"hosts: {lost} of {total} blocks have no live replica{why}"})

    def _wait_for_experts(self, error: TooFewExpertsError) -> None:
        """Called on a compute thread; returns when it is worth trying again, raises DrainingError when leaving."""
        if error.failed_peers:
            # They are avoided from now on: the gate chooses among the others at once.
            self._events.emit("retry", step=self._progress.step + 1, reason=str(error))
            return
        self._emit_waiting(f" ({error})")
        self._dispatcher.wait_for_change(WAIT_FOR_CHANGE_S)

    def _describe(self) -> Announcement:
        seconds, tokens = self._progress.train_seconds, self._progress.run_tokens
        peer = PeerRecord(
            role="trainer",
            software=SOFTWARE,
            started_s=self._started_at,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            run_tokens=tokens,
        )
        return Announcement(peer=peer)

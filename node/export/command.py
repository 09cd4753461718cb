"""`export`: a run's model is taken from its live replicas and written to a folder that transformers loads."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from common.assets import asset_store
from common.errors import ConfigError, DataError, DrainingError
from common.folders import FolderClaim, claimed
from common.progress import progress_shown
from common.settings import check_minimums
from common.tasks import until_stopped
from common.text import bytes_text
from node.export.card import card_text, training_of
from node.export.small_files import small_files
from node.export.source import Checkpoint, PartSource
from node.export.unfinished import Taken, UnfinishedExport
from node.membership.config import ReachConfig
from node.membership.swarm import Swarm
from node.trainer.evaluation import print_result
from node.trainer.exported.layout import PretrainedPiece, groups_of, parts_of
from node.trainer.live_trunk import live_replicas
from node.trainer.run_files import fetch_tokenizer
from protocol.exportable import check_exportable
from protocol.identity import Identity
from protocol.manifest import TRUNK, BlockId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch

    from node.averaging.live_replicas import LiveReplicas
    from node.export.config import ExportConfig
    from node.export.pretrained_model import PretrainedParts
    from node.trainer.exported.layout import ModelPart
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

AT_ONCE = 4
"""Parts that are downloaded at once: each is held in memory."""

MB = 1_000_000


async def run_export(config: ExportConfig, stop: asyncio.Event) -> None:
    """Write the folder, or go on with one that was begun, and print what is in it.

    Raises:
        ConfigError: a setting is wrong, or --out is of something else.
        UnavailableError: a part of the model cannot be had; what came stays, for the next time.
        CheckpointError: the folder cannot be written.
    """
    check_minimums(config, {"shard_mb": 1, "wait_for_replicas_s": 0, "join_timeout_s": 0.1})
    out = _folder_of(config)
    claim = FolderClaim(folder=out.parent, file=out.name, lock=f".{out.name}.lock", role="export", flag="--out")
    with claimed(claim):
        try:
            await _joined(config, stop)
        except DrainingError:
            if not stop.is_set():
                raise
            logger.info("Stopped; start again with the same --out to go on behind what has come")


def _folder_of(config: ExportConfig) -> Path:
    out = config.out.resolve()
    if not out.name:
        raise ConfigError(f"--out: {out} cannot be made anew; name a folder that is not there yet")
    return out


async def _joined(config: ExportConfig, stop: asyncio.Event) -> None:
    swarm = Swarm(config, Identity.generate(), ReachConfig(listen=config.listen))
    try:
        await until_stopped(swarm.join(), stop)
        check_exportable(swarm.manifest)
        await fetch_tokenizer(swarm, config.tokenizer, config.join_timeout_s, stop)
        await until_stopped(_export(config, swarm, stop), stop)
    finally:
        await swarm.leave()
    print_result(await asyncio.to_thread(_summary, config.out, swarm.manifest))


async def _export(config: ExportConfig, swarm: Swarm, stop: asyncio.Event) -> None:
    manifest = swarm.manifest
    pretrained = await asyncio.to_thread(pretrained_parts, manifest)
    outline = None if pretrained is None else pretrained.outline
    parts = await asyncio.to_thread(parts_of, manifest, outline)
    unfinished = UnfinishedExport(_folder_of(config), manifest.run_id, groups_of(parts, config.shard_mb * MB))
    if not await asyncio.to_thread(unfinished.begin):
        unfinished.clear()
        return
    await asyncio.to_thread(unfinished.check_room)
    async with live_replicas(swarm, config.wait_for_replicas_s, "--trunk") as replicas:
        await _Exporting(unfinished, _Sources(replicas, config.trunk, pretrained), stop).run()
    files = await asyncio.to_thread(_files, config, unfinished, swarm, pretrained)
    await asyncio.to_thread(unfinished.finish, files)


def pretrained_parts(manifest: Manifest) -> PretrainedParts | None:
    """The pretrained model that the run is built around, if there is one."""
    if manifest.model.trunk != "hf":
        return None
    from node.export.pretrained_model import PretrainedParts  # noqa: PLC0415 - few runs need transformers, see there

    logger.info("Reading the run's pretrained model")
    return PretrainedParts(manifest)


class _Progress:
    """How much of the model that was missing has come."""

    def __init__(self) -> None:
        self._tell: Callable[[float, str], None] = lambda _done, _words: None
        self._done_bytes = self._total_bytes = 0

    @contextmanager
    def shown(self, total_bytes: int) -> Iterator[None]:
        """Show it meanwhile."""
        self._total_bytes = total_bytes
        with progress_shown(total_bytes) as self._tell:
            self.add(0)
            yield

    def add(self, n_bytes: int) -> None:
        """So many more are here."""
        self._done_bytes += n_bytes
        self._tell(self._done_bytes, f"{bytes_text(self._done_bytes)} of {bytes_text(self._total_bytes)} are here")


class _Sources:
    """Where parts come from: replicas, the trunk's checkpoint if there is one, the pretrained model's files."""

    def __init__(self, replicas: LiveReplicas, trunk: Path | None, pretrained: PretrainedParts | None) -> None:
        self._replicas, self._pretrained = replicas, pretrained
        self._outline = None if pretrained is None else pretrained.outline
        self._parts = PartSource(replicas, self._outline)
        self._checkpoint = Checkpoint(trunk) if trunk else None

    async def wait_for(self, parts: Sequence[ModelPart]) -> None:
        """Return once each part that comes from a replica has one; UnavailableError that says which have none."""
        blocks = [part.id for part in parts if isinstance(part.id, BlockId)]
        await self._replicas.wait_for([block for block in blocks if block != TRUNK or self._checkpoint is None])

    async def fetch(self, part: ModelPart) -> tuple[dict[str, torch.Tensor], Taken]:
        """The tensors of a part, and where they came from. Raises UnavailableError, CheckpointError."""
        pretrained, block_id = self._pretrained, part.id
        if pretrained is not None and isinstance(block_id, PretrainedPiece):
            return await asyncio.to_thread(pretrained.tensors, part), Taken(version=0, word="the run's files")
        if block_id != TRUNK:
            return await self._parts.fetch_block(cast("BlockId", block_id), part.tensors)
        if self._checkpoint is None:
            return await self._parts.fetch_trunk()
        return await asyncio.to_thread(self._checkpoint.read, self._replicas.manifest, self._outline)


class _Exporting:
    """Parts come, group by group, each group's files are written when its parts are there."""

    def __init__(self, unfinished: UnfinishedExport, sources: _Sources, stop: asyncio.Event) -> None:
        self._unfinished, self._sources, self._stop = unfinished, sources, stop
        self._permits = asyncio.Semaphore(AT_ONCE)
        self._progress = _Progress()

    async def run(self) -> None:
        left = [g for g in self._unfinished.groups if await asyncio.to_thread(self._unfinished.record, g) is None]
        missing = [part for group in left for part in group.parts if not self._unfinished.has(part)]
        await self._sources.wait_for(missing)
        missing_ids = {part.id for part in missing}
        with self._progress.shown(sum(part.n_bytes for part in missing)):
            for group in left:
                await self._fetch_all([part for part in group.parts if part.id in missing_ids])
                await asyncio.to_thread(self._unfinished.write, group)

    async def _fetch_all(self, parts: list[ModelPart]) -> None:
        tasks = [asyncio.create_task(self._fetch(part)) for part in parts]
        try:
            for task in asyncio.as_completed(tasks):
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, part: ModelPart) -> None:
        async with self._permits:
            if self._stop.is_set():  # what is under way is ended; nothing is begun
                raise DrainingError("stopped before it was done")
            tensors, taken = await self._sources.fetch(part)
            await asyncio.to_thread(self._unfinished.keep, part, tensors, taken)
            self._progress.add(part.n_bytes)


def _files(
    config: ExportConfig, unfinished: UnfinishedExport, swarm: Swarm, pretrained: PretrainedParts | None
) -> dict[str, bytes]:
    """Everything but the weights, by name."""
    manifest, taken, directory = swarm.manifest, unfinished.taken(), swarm.directory
    newest = {block_id: max((r.version for r in directory.replicas(block_id)), default=0) for block_id in taken}
    card = card_text(manifest, taken, newest, training_of(config.trunk, manifest.run_id))
    return small_files(manifest, unfinished.groups, taken, card, _tokenizer(manifest), pretrained)


def _tokenizer(manifest: Manifest) -> bytes | None:
    """The run's own file, which `fetch_tokenizer` has left on this machine; None where tokens are bytes."""
    asset = manifest.data.tokenizer_asset
    if asset is None:
        return None
    data = asset_store().find(asset)
    if data is None:
        raise DataError(f"the run's tokenizer {asset} is not on this machine any more; start again to fetch it")
    return data


def _summary(out: Path, manifest: Manifest) -> str:
    files = list(out.glob("*.safetensors"))
    model = manifest.model
    n_experts, size = model.n_layers * model.experts_per_layer, sum(file.stat().st_size for file in files)
    trunk = "the pretrained model, the trunk" if model.trunk == "hf" else "the trunk"
    return (
        f"{out}: {trunk} and {n_experts:,} experts of run {manifest.run_id}, {bytes_text(size)} of weights in "
        f"{len(files)} {'file' if len(files) == 1 else 'files'}"
    )

"""A host's blocks on disk: one checkpoint each, those it serves and those it has given up but could still hand out."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from common.errors import CheckpointError
from node.model.checkpoint import (
    PREVIOUS_SUFFIX,
    SUFFIX,
    previous_path,
    read_checkpoint,
    read_metadata,
    write_checkpoint,
)
from node.model.devices import first_line
from node.model.experts.block import new_block
from node.model.experts.state import block_metadata, block_state, block_tensors, restore_block
from protocol.manifest import BlockId

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    import torch

    from node.model.experts.block import Block
    from node.model.replica_state import ReplicaState
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)


class BlockStore:
    """Checkpoints of one run's blocks below a host's state folder. Every method reads or writes files."""

    def __init__(self, state: Path, manifest: Manifest, device: torch.device) -> None:
        self._state, self._manifest, self._device = state, manifest, device

    def versions(self) -> dict[BlockId, int]:
        """Version of every block that has a readable checkpoint of this run."""
        found = {}
        for block_id in self._block_ids():
            if self._in_grid(block_id):
                version = self._version(block_path(self._state, block_id))
                if version is not None:
                    found[block_id] = version
        return found

    def load(self, block_id: BlockId) -> Block | None:
        """The block as it was saved, None if it never was; raises CheckpointError."""
        stored = read_checkpoint(block_path(self._state, block_id))
        return None if stored is None else restore_block(self._manifest, block_id, *stored, self._device)

    def load_or_new(self, block_id: BlockId) -> Block:
        """The block as it was saved, else as the run's seed has it; raises CheckpointError."""
        return self.load(block_id) or new_block(self._manifest, block_id, self._device)

    def state(self, block_id: BlockId) -> ReplicaState | None:
        """A saved block for another peer; None if there is none that can be read."""
        try:
            block = self.load(block_id)
        except CheckpointError as error:
            logger.warning("%s", error)
            return None
        return None if block is None else block_state(block)

    def copy(self, block: Block) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `write` takes; call it where the block's weights may be touched.

        Raises CheckpointError if the device does not give them: the checkpoint on disk is the newest then.
        """
        try:
            return block_tensors(block), block_metadata(block, self._manifest.run_id)
        except RuntimeError as error:
            raise CheckpointError(f"block {block.id}: its device does not give it back: {first_line(error)}") from None

    def write(self, block_id: BlockId, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Replace the block's checkpoint; raises CheckpointError, and the old one stays."""
        write_checkpoint(block_path(self._state, block_id), tensors, metadata)

    def trim(self, max_bytes: int, kept: Collection[BlockId]) -> list[BlockId]:
        """Delete checkpoints until the whole state folder has `max_bytes`: those written longest ago, never the `kept`.

        Returns the blocks that are gone, also if there is still too much.
        """
        gone, left = [], folder_bytes(self._state) - max_bytes
        for block_id in sorted(self._block_ids() - set(kept), key=self._written_at):
            if left <= 0:
                break
            for file in self._files(block_id):
                left -= file.stat().st_size
                file.unlink()
            gone.append(block_id)
        return gone

    def _files(self, block_id: BlockId) -> list[Path]:
        path = block_path(self._state, block_id)
        return [file for file in (path, previous_path(path)) if file.exists()]

    def _written_at(self, block_id: BlockId) -> float:
        return self._files(block_id)[0].stat().st_mtime

    def _block_ids(self) -> set[BlockId]:
        """Return the blocks of all checkpoints. A host killed between two renames left only the previous one."""
        names = {path.name.replace(PREVIOUS_SUFFIX, SUFFIX) for path in (self._state / "blocks").glob(f"*{SUFFIX}")}
        return {block_id for name in names if (block_id := _block_of(name)) is not None}

    def _in_grid(self, block_id: BlockId) -> bool:
        model = self._manifest.model
        return block_id.layer < model.n_layers and block_id.block < model.blocks_per_layer

    def _version(self, path: Path) -> int | None:
        metadata = read_metadata(path)
        version = metadata.get("version", "")
        return int(version) if metadata.get("run_id") == self._manifest.run_id and version.isdecimal() else None


def folder_bytes(folder: Path) -> int:
    """Size of all files below it; of those that vanish meanwhile, none."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def block_path(state: Path, block_id: BlockId) -> Path:
    """Where a host keeps the checkpoint of a block."""
    return state / "blocks" / f"{block_id.layer}-{block_id.block}.safetensors"


def _block_of(file_name: str) -> BlockId | None:
    layer, _, block = file_name.removesuffix(".safetensors").partition("-")
    return BlockId(int(layer), int(block)) if layer.isdecimal() and block.isdecimal() else None

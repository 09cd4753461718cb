"""An export on its way: a folder beside the one that is wanted, which gets its name when all of it is there.

A part of the model is kept as it came until the files of its group are written, read back and recorded; so whatever
ends the process, the next one goes on behind the last part that had come. The same parts give the same files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.atomic_file import sync_folder, write_atomically
from common.errors import CheckpointError, ConfigError
from common.text import bytes_text
from node.trainer.exported.sums import SUMS, file_sum, sums_text
from protocol.manifest import BlockId

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from node.trainer.exported.layout import FileGroup, ModelPart

FORMAT: Final = 1
ABOUT: Final = "about"
SHARD_METADATA: Final = {"format": "pt"}

Word = Literal["two replicas", "one replica", "a checkpoint", "the run's files"]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Where a part of the model came from: at which version, and on whose word.

    `run_tokens`: the tokens that the run had trained on by then, known with the trunk; else 0. The version is 0 for a
    pretrained model, whose files a manifest names by hash.
    """

    version: int
    word: Word
    run_tokens: int = 0


class UnfinishedExport:
    """The files of an export to `out`, of `groups`, until they are all there. Belongs to one process at a time."""

    def __init__(self, out: Path, run_id: str, groups: Sequence[FileGroup]) -> None:
        self.out, self.groups = out, groups
        self.folder = out.with_name(f"{out.name}.partial")
        self._plan = {"format": FORMAT, "run_id": run_id, "files": [list(_names(group)) for group in groups]}
        self._state, self._model = self.folder / "state.json", self.folder / "model"
        self._parts, self._records = self.folder / "parts", self.folder / "records"

    def begin(self) -> bool:
        """Make the folder or go on with it; False if nothing is left to do but to take it away.

        Raises ConfigError where `out`, or the folder, has something else in it.
        """
        going_on = self._is_ours()
        if _has_something(self.out):
            if (going_on and not self._model.exists()) or self._is_left_over():
                return False
            raise ConfigError(f"--out: {self.out} is not empty; name a folder that is not there yet")
        if not going_on:
            if _has_something(self.folder):
                raise ConfigError(
                    f"--out: {self.folder} is no unfinished export of this run with these settings; move it away, or "
                    "name another folder"
                )
            self._write(self._state, json.dumps(self._plan).encode())
        with _named_errors(self.folder):
            for folder in (self._model, self._parts, self._records):
                folder.mkdir(exist_ok=True)
                for leftover in folder.glob(".*"):  # of a file that was being written
                    leftover.unlink()
        return True

    def check_room(self) -> None:
        """Raise CheckpointError if the disk has no room for what is missing, with one group's parts beside it."""
        missing = [sum(part.n_bytes for part in g.parts) for g in self.groups if self.record(g) is None]
        needed, free = sum(missing) + max(missing, default=0), shutil.disk_usage(self.folder).free
        if needed > free:
            raise CheckpointError(
                f"{self.folder}: {bytes_text(needed)} are still to be written, and {bytes_text(free)} are free: free "
                "space there, or name another folder with --out"
            )

    def has(self, part: ModelPart) -> bool:
        """Whether a part has come, whole."""
        return self._about(part) is not None

    def keep(self, part: ModelPart, tensors: Mapping[str, torch.Tensor], taken: Taken) -> None:
        """Write a part that has come. Raises CheckpointError."""
        data = save({name: t.contiguous() for name, t in tensors.items()}, {ABOUT: json.dumps(asdict(taken))})
        self._write(self._part_path(part), data)

    def record(self, group: FileGroup) -> Mapping[str, str] | None:
        """SHA-256 of a group's files, if they are all written and as they were; None if not."""
        told = _json_or_none(self._record_path(group))
        sums = told.get("files") if isinstance(told, dict) else None
        if not isinstance(sums, dict) or set(sums) != set(_names(group)):
            return None
        try:
            return sums if all(file_sum(self._model / name) == found for name, found in sums.items()) else None
        except OSError:
            return None

    def write(self, group: FileGroup) -> None:
        """Write the files of a group whose parts have all come, and read them back. Raises CheckpointError."""
        taken = {str(part.id): self._about(part) for part in group.parts}
        sums: dict[str, str] = {}
        with ExitStack() as stack:
            tensors: dict[str, Any] = {}
            for part in group.parts:
                file = stack.enter_context(safe_open(self._part_path(part), framework="pt"))
                tensors |= {tensor.name: file for tensor in part.tensors}
            for name, wanted in group.files:
                data = save({t.name: tensors[t.name].get_tensor(t.name) for t in wanted}, SHARD_METADATA)
                sums[name] = self._write_checked(self._model / name, data)
        self._write(self._record_path(group), json.dumps({"files": sums, "parts": taken}).encode())
        self.tidy(group)

    def tidy(self, group: FileGroup) -> None:
        """Take the parts of a group away that is recorded."""
        for part in group.parts:
            self._part_path(part).unlink(missing_ok=True)

    def taken(self) -> dict[BlockId, Taken]:
        """Where the trunk and each block came from, once all groups are written."""
        taken: dict[BlockId, Taken] = {}
        for group in self.groups:
            about = json.loads(self._record_path(group).read_bytes())["parts"]
            blocks = [part.id for part in group.parts if isinstance(part.id, BlockId)]
            taken |= {block_id: Taken(**about[str(block_id)]) for block_id in blocks}
        return taken

    def sums(self) -> dict[str, str]:
        """SHA-256 of every file that has been written, by name; raises CheckpointError if one is damaged since."""
        sums: dict[str, str] = {}
        for group in self.groups:
            record = self.record(group)
            if record is None:
                raise CheckpointError(f"{self._model}: a file was damaged meanwhile; start again to write it anew")
            sums |= record
        return sums

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write the small files, and give the folder its name. Raises CheckpointError."""
        sums = self.sums()
        for name, data in files.items():
            sums[name] = self._write_checked(self._model / name, data)
        self._write(self._model / SUMS, sums_text(sums).encode())
        with _named_errors(self.out):
            self._model.rename(self.out)
            sync_folder(self.out.parent)
        self.clear()

    def clear(self) -> None:
        """Take the folder away once the model has its name; what says whose it is goes last."""
        with _named_errors(self.folder):
            for folder in (self._parts, self._records):
                if folder.exists():
                    shutil.rmtree(folder)
            self._state.unlink(missing_ok=True)
            self.folder.rmdir()

    def _is_left_over(self) -> bool:
        """Whether the process that gave `out` its name was ended before the last step, which takes the folder away."""
        return (self.out / SUMS).is_file() and self.folder.is_dir() and not _has_something(self.folder)

    def _is_ours(self) -> bool:
        return _json_or_none(self._state) == self._plan

    def _about(self, part: ModelPart) -> dict[str, Any] | None:
        """What a part's file says of it; None if there is none, or none that is whole."""
        try:
            with safe_open(self._part_path(part), framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
                about: dict[str, Any] = json.loads((file.metadata() or {})[ABOUT])
        except (SafetensorError, OSError, ValueError, KeyError):
            return None
        return about if shapes == {tensor.name: tensor.shape for tensor in part.tensors} else None

    def _part_path(self, part: ModelPart) -> Path:
        return self._parts / f"{str(part.id).replace('/', '-')}.safetensors"

    def _record_path(self, group: FileGroup) -> Path:
        return self._records / f"{group.files[0][0]}.json"

    def _write_checked(self, path: Path, data: bytes) -> str:
        """Write a file and compare what is read back; its SHA-256."""
        written = hashlib.sha256(data).hexdigest()
        self._write(path, data)
        with _named_errors(path):
            if file_sum(path) != written:
                raise CheckpointError(f"{path}: reads back as another file than was written: look at the disk")
        return written

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        with _named_errors(path):
            write_atomically(path, data)


def _names(group: FileGroup) -> tuple[str, ...]:
    return tuple(name for name, _ in group.files)


def _has_something(folder: Path) -> bool:
    """Whether there is something other than an empty folder; raises ConfigError for what is no folder."""
    try:
        return any(folder.iterdir())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"--out: {folder}: {error.strerror}; name a folder that is not there yet") from None


def _json_or_none(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; what is there is kept: start again, to go on with "
            "it, when that is mended"
        ) from None

"""Files that a run names by what they hold: their SHA-256 and size. A store keeps them under their hash."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.atomic_file import sync_folder, write_atomically
from common.errors import ConfigError, DataError
from common.folders import data_cache

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FOLDERS = "folders"


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A file by what it holds; `sha256` in hex digits."""

    sha256: str
    n_bytes: int

    def __str__(self) -> str:
        return f"{self.sha256[:12]}… ({self.n_bytes:,} bytes)"


def asset_of(data: bytes) -> Asset:
    """Name `data`."""
    return Asset(sha256=hashlib.sha256(data).hexdigest(), n_bytes=len(data))


def asset_of_file(path: Path) -> Asset:
    """Name a file, which may be larger than the memory. Raises OSError."""
    with path.open("rb") as file:
        return Asset(sha256=hashlib.file_digest(file, "sha256").hexdigest(), n_bytes=file.tell())


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a file that a person named; raises ConfigError if it cannot be read, or has more than `max_bytes`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > max_bytes:
        raise ConfigError(f"{path}: is larger than {max_bytes:,} bytes, the most that is read")
    return data


def asset_store() -> AssetStore:
    """What this user keeps of runs' assets. Raises ConfigError where no folder can be written."""
    return AssetStore(data_cache() / "assets")


class AssetStore:
    """Assets in a folder, one file each. What is read is checked: a file that was damaged counts as missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, asset: Asset) -> Path:
        """Where `asset` is kept."""
        return self._folder / asset.sha256

    def add(self, data: bytes) -> Asset:
        """Keep `data`; raises DataError if that cannot be written."""
        asset = asset_of(data)
        try:
            write_atomically(self.path(asset), data)
        except OSError as error:
            raise self._not_written(error) from None
        return asset

    def add_file(self, path: Path) -> Asset:
        """Keep a copy of a file.

        Raises DataError if that cannot be written, ConfigError if the file cannot be read.
        """
        try:
            asset = asset_of_file(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
        if self.holds(asset):
            return asset
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder) as own:  # another process may copy the same
                copy = shutil.copyfile(path, Path(own) / asset.sha256)
                if self._adopt(copy, asset):
                    return asset
        except OSError as error:
            raise self._not_written(error) from None
        raise ConfigError(f"{path}: changed while it was read; try again")

    def part(self, asset: Asset) -> Path:
        """Where bytes of `asset` are gathered that are not whole yet."""
        return self._folder / f"{asset.sha256}.part"

    @contextmanager
    def gathering(self, asset: Asset) -> Iterator[bool]:
        """Whether this process alone gathers `asset` while the context lasts, or another one does."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self.part(asset).with_suffix(".lock").open("ab")
        except OSError as error:
            raise self._not_written(error) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file closes, also by a crash
            except BlockingIOError:
                yield False
            else:
                yield True

    def gather(self, asset: Asset, piece: bytes) -> None:
        """Add the next bytes of `asset`. Raises DataError if they cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self.part(asset).open("ab") as file:
                file.write(piece)
        except OSError as error:
            raise self._not_written(error) from None

    def adopt(self, asset: Asset) -> bool:
        """Keep what was gathered if it is `asset`, and drop it if not; whether it was. Raises DataError."""
        part = self.part(asset)
        try:
            if self._adopt(part, asset):
                return True
            part.unlink()
        except OSError as error:
            raise self._not_written(error) from None
        return False

    def _adopt(self, path: Path, asset: Asset) -> bool:
        if asset_of_file(path) != asset:
            return False
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(self.path(asset))
        sync_folder(self._folder)
        return True

    def holds(self, asset: Asset) -> bool:
        """Whether `asset` is here as it should be."""
        path = self.path(asset)
        try:
            return path.stat().st_size == asset.n_bytes and asset_of_file(path) == asset
        except OSError:
            return False

    def read(self, asset: Asset, offset: int, n_bytes: int) -> bytes:
        """Read up to `n_bytes` of `asset` from `offset` on, unchecked; empty if it is not here."""
        try:
            with self.path(asset).open("rb") as file:
                file.seek(offset)
                return file.read(n_bytes)
        except OSError:
            return b""

    def find(self, asset: Asset) -> bytes | None:
        """Read the whole of `asset`; None if it is not here as it should be."""
        return self.path(asset).read_bytes() if self.holds(asset) else None

    def folder_of(self, files: Mapping[str, Asset]) -> Path:
        """A folder in which assets that are here have these names. Raises DataError if it cannot be made."""
        listing = "".join(f"{asset.sha256} {name}\n" for name, asset in sorted(files.items()))
        folder = self._folder / FOLDERS / hashlib.sha256(listing.encode()).hexdigest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, asset in files.items():
                with suppress(FileExistsError):
                    (folder / name).symlink_to(os.path.relpath(self.path(asset), folder))
        except OSError as error:
            raise self._not_written(error) from None
        return folder

    def _not_written(self, error: OSError) -> DataError:
        return DataError(
            f"{self._folder} cannot be written: {error.strerror or error}. Free space there, or set "
            "KILOHIVE_CACHE to a folder that you can write to."
        )

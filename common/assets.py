"""Files that a run names by what they hold: their SHA-256 and size. A store keeps them under their hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.atomic_file import write_atomically
from common.errors import ConfigError, DataError
from common.folders import data_cache

if TYPE_CHECKING:
    from pathlib import Path


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
            raise DataError(
                f"{self._folder} cannot be written: {error.strerror or error}. Free space there, or set "
                "KILOHIVE_CACHE to a folder that you can write to."
            ) from None
        return asset

    def read(self, asset: Asset, offset: int, n_bytes: int) -> bytes:
        """Read up to `n_bytes` of `asset` from `offset` on, unchecked; empty if it is not here."""
        try:
            with self.path(asset).open("rb") as file:
                file.seek(offset)
                return file.read(n_bytes)
        except OSError:
            return b""

    def find(self, asset: Asset) -> bytes | None:
        """Read `asset`; None if it is not here as it should be."""
        path = self.path(asset)
        try:
            if path.stat().st_size != asset.n_bytes:
                return None
            data = path.read_bytes()
        except OSError:
            return None
        return data if asset_of(data) == asset else None

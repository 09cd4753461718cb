"""Files that a run names by what they hold: their SHA-256 and size. A store keeps them under their hash.

    SHA256         the file; its time is that of its last use
    SHA256.part    what has come of one that is being fetched, by whoever holds SHA256.lock
    SHA256.used    held by every process that uses the file, or writes it
    folders/       links to files of one model, by the names that they have in it

What no process uses goes where the store is over its bound: what was used longest ago first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.atomic_file import sync_folder, write_atomically
from common.errors import ConfigError, DataError
from common.eviction import CacheEntry, keep_below
from common.folders import assets_bytes, data_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    Tell = Callable[[int], None]

ASSETS: Final = "assets"
"""The store's folder in the cache."""

FOLDERS: Final = "folders"
GATHERED, IN_USE = ".lock", ".used"
OF_ASSET: Final = re.compile(r"\.?([0-9a-f]{64})(\..+)?")
"""Names of an asset's file, and of what is there of one that is not whole."""

SHORT_CHARS = 12
CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A file by what it holds; `sha256` in hex digits."""

    sha256: str
    n_bytes: int

    def __str__(self) -> str:
        return f"{self.sha256[:SHORT_CHARS]}… ({self.n_bytes:,} bytes)"


def asset_of(data: bytes) -> Asset:
    """Name `data`."""
    return Asset(sha256=hashlib.sha256(data).hexdigest(), n_bytes=len(data))


def asset_of_file(path: Path, tell: Tell = lambda _: None) -> Asset:
    """Name a file, which may be larger than the memory. Raises OSError."""
    digest, n_bytes = hashlib.sha256(), 0
    for chunk in _chunks(path, tell):
        digest.update(chunk)
        n_bytes += len(chunk)
    return Asset(sha256=digest.hexdigest(), n_bytes=n_bytes)


def _chunks(path: Path, tell: Tell) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            tell(len(chunk))


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
    return AssetStore(data_cache() / ASSETS, assets_bytes())


@contextmanager
def assets_in_use(assets: Collection[Asset]) -> Iterator[None]:
    """Have a run's assets stay on this machine while the context lasts, those that come meanwhile too.

    Raises ConfigError where no folder can be written.
    """
    with asset_store().using(assets) if assets else nullcontext():
        yield


def stored_assets(folder: Path) -> list[CacheEntry]:
    """Everything in a store, what was used longest ago first."""
    paths: defaultdict[str, list[Path]] = defaultdict(list)
    for path in folder.glob("*"):
        name = OF_ASSET.fullmatch(path.name)
        if name and path.suffix not in {GATHERED, IN_USE}:
            paths[name[1]].append(path)
    links = _links(folder / FOLDERS)
    found = (_stored(folder, sha256, of_asset, links[sha256]) for sha256, of_asset in paths.items())
    return sorted(filter(None, found), key=lambda stored: (stored.used_s, stored.name))


class AssetStore:
    """Assets in a folder, one file each. What is read is checked: a file that was damaged counts as missing.

    With `max_bytes` it is kept below that, whatever is added.
    """

    def __init__(self, folder: Path, max_bytes: int = 0) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def path(self, asset: Asset) -> Path:
        """Where `asset` is kept."""
        return self._folder / asset.sha256

    def add(self, data: bytes) -> Asset:
        """Keep `data`; raises DataError if that cannot be written."""
        asset = asset_of(data)
        with self.using((asset,)):
            try:
                write_atomically(self.path(asset), data)
            except OSError as error:
                raise self._not_written(error) from None
            keep_below(self._max_bytes, self._folder, stored_assets)
        return asset

    def add_file(self, path: Path, tell: Tell = lambda _: None) -> Asset:
        """Keep a copy of a file; `tell` hears of each piece, so many bytes, that is read on the way: thrice at most.

        Raises DataError if that cannot be written, ConfigError if the file cannot be read.
        """
        try:
            asset = asset_of_file(path, tell)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
        with self.using((asset,)):
            if not self.holds(asset, tell):
                self._copy(path, asset, tell)
        return asset

    def _copy(self, path: Path, asset: Asset, tell: Tell) -> None:
        prefix = f".{asset.sha256}."
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=prefix, dir=self._folder) as own:  # others may copy the same
                copy = Path(own) / asset.sha256
                with copy.open("wb") as file:
                    file.writelines(_chunks(path, tell))
                if self._adopt(copy, asset, tell):
                    return
        except OSError as error:
            raise self._not_written(error) from None
        raise ConfigError(f"{path}: changed while it was read; try again")

    @contextmanager
    def using(self, assets: Collection[Asset]) -> Iterator[None]:
        """Have nobody delete these assets while the context lasts; they need not be here yet."""
        with ExitStack() as stack:
            for asset in assets:
                # Where no lock can be had nothing is deleted either, but by another user whose store it is.
                with suppress(OSError):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context((self._folder / f"{asset.sha256}{IN_USE}").open("ab"))
                    fcntl.flock(file, fcntl.LOCK_SH)  # released when the file closes, also by a crash
            stack.callback(self._note_use, assets)
            self._note_use(assets)
            yield

    def _note_use(self, assets: Collection[Asset]) -> None:
        for asset in assets:
            with suppress(OSError):  # it is not here yet, or another user's
                os.utime(self.path(asset))

    def part(self, asset: Asset) -> Path:
        """Where bytes of `asset` are gathered that are not whole yet."""
        return self._folder / f"{asset.sha256}.part"

    @contextmanager
    def gathering(self, asset: Asset) -> Iterator[bool]:
        """Whether this process alone gathers `asset` while the context lasts, or another one does."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self.part(asset).with_suffix(GATHERED).open("ab")
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

    def _adopt(self, path: Path, asset: Asset, tell: Tell = lambda _: None) -> bool:
        if asset_of_file(path, tell) != asset:
            return False
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(self.path(asset))
        sync_folder(self._folder)
        keep_below(self._max_bytes, self._folder, stored_assets)
        return True

    def holds(self, asset: Asset, tell: Tell = lambda _: None) -> bool:
        """Whether `asset` is here as it should be."""
        path = self.path(asset)
        try:
            return path.stat().st_size == asset.n_bytes and asset_of_file(path, tell) == asset
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
        data = self.read(asset, 0, asset.n_bytes + 1)
        return data if asset_of(data) == asset else None

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


def _stored(folder: Path, sha256: str, of_asset: list[Path], links: set[Path]) -> CacheEntry | None:
    try:
        n_bytes = sum(map(_size, of_asset))
        used_s = max(path.stat().st_mtime for path in of_asset)
    except FileNotFoundError:  # it has just become whole, or was deleted
        return None
    locks = (folder / f"{sha256}{GATHERED}", folder / f"{sha256}{IN_USE}")
    return CacheEntry(
        name=sha256[:SHORT_CHARS],
        paths=(*sorted(links), *of_asset),
        n_bytes=n_bytes,
        used_s=used_s,
        locks=locks,
    )


def _size(path: Path) -> int:
    """The size of a file, or of those in the folder to which one is being copied."""
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)


def _links(folders: Path) -> defaultdict[str, set[Path]]:
    """Folders of links, by the SHA-256 of each file that they link to: without that file they are of no use."""
    found: defaultdict[str, set[Path]] = defaultdict(set)
    for link in folders.glob("*/*"):
        with suppress(OSError):  # deleted just now, or no link
            found[link.readlink().name].add(link.parent)
    return found

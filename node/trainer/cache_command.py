"""`cache`: what prepared text, and runs' tokenizers and models, take of this machine's disk, and how to get it back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.assets import ASSETS, stored_assets
from common.errors import ConfigError
from common.folders import ASSETS_MAX_SIZE_VARIABLE, MAX_SIZE_VARIABLE, assets_bytes, data_cache, data_cache_bytes
from common.text import bytes_text, clock_text, printable
from node.data.eviction import stored_corpora

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from common.eviction import CacheEntry
    from node.trainer.config import CacheConfig


@dataclass(frozen=True, kw_only=True)
class CachePart:
    """A part of the cache: what one thing in it is called, and several; where they lie; and what bounds them."""

    one: str
    several: str
    folder: Path
    stored_in: Callable[[Path], Sequence[CacheEntry]]
    max_bytes: int
    variable: str


async def run_cache(config: CacheConfig, _stop: asyncio.Event) -> None:
    """Print what is in the cache, or delete what nobody uses of it."""
    folder, console = data_cache(), Console(highlight=False, soft_wrap=True)
    for number, part in enumerate(_parts(folder)):
        try:
            stored = await asyncio.to_thread(part.stored_in, part.folder)
            if config.clear:
                console.print(await asyncio.to_thread(_clear, part, stored), markup=False)
            else:
                console.print("\n" * (number > 0) + _head(part, stored), markup=False)
                _show(part, stored, console)
        except OSError as error:
            raise ConfigError(f"{error.filename or part.folder}: {error.strerror or error}") from None


def _parts(folder: Path) -> tuple[CachePart, CachePart]:
    corpora = CachePart(
        one="corpus",
        several="corpora",
        folder=folder,
        stored_in=stored_corpora,
        max_bytes=data_cache_bytes(),
        variable=MAX_SIZE_VARIABLE,
    )
    assets = CachePart(
        one="asset",
        several="assets",
        folder=folder / ASSETS,
        stored_in=stored_assets,
        max_bytes=assets_bytes(),
        variable=ASSETS_MAX_SIZE_VARIABLE,
    )
    return corpora, assets


def _clear(part: CachePart, stored: Sequence[CacheEntry]) -> str:
    gone = [one for one in stored if one.remove()]
    n_bytes = sum(one.n_bytes for one in gone)
    stays = f"; {len(stored) - len(gone):,} in use stay" if len(gone) < len(stored) else ""
    return f"{part.folder}: deleted {len(gone):,} of {len(stored):,} {part.several}, {bytes_text(n_bytes)}{stays}"


def _head(part: CachePart, stored: Sequence[CacheEntry]) -> str:
    total = bytes_text(sum(one.n_bytes for one in stored))
    bound = f"of at most {bytes_text(part.max_bytes)}" if part.max_bytes else "without a bound"
    name = part.one if len(stored) == 1 else part.several
    return f"{part.folder}: {len(stored):,} {name}, {total} {bound} ({part.variable})"


def _show(part: CachePart, stored: Sequence[CacheEntry], console: Console) -> None:
    if not stored:
        return
    table = Table(box=None, pad_edge=False)
    for column in (part.one, "size", "used", ""):
        table.add_column(column, no_wrap=True, justify="right" if column == "size" else "left")
    for one in reversed(stored):
        ago = f"{clock_text(time.time() - one.used_s)} ago"
        table.add_row(Text(printable(one.name)), bytes_text(one.n_bytes), ago, "in use" if one.in_use() else "")
    console.print()
    console.print(table)

"""`cache`: what prepared text takes of this machine's disk, and how to get it back."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import ConfigError
from common.folders import MAX_SIZE_VARIABLE, data_cache, data_cache_bytes
from common.text import bytes_text, clock_text, printable
from node.data.eviction import stored_corpora

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from common.eviction import CacheEntry
    from node.trainer.config import CacheConfig


async def run_cache(config: CacheConfig, _stop: asyncio.Event) -> None:
    """Print what is in the cache, or delete what nobody uses of it."""
    folder, console = data_cache(), Console(highlight=False, soft_wrap=True)
    try:
        stored = await asyncio.to_thread(stored_corpora, folder)
        if config.clear:
            text = await asyncio.to_thread(_clear, folder, stored)
            console.print(text, markup=False)
        else:
            _show(folder, stored, console)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror or error}") from None


def _clear(folder: Path, stored: Sequence[CacheEntry]) -> str:
    gone = [corpus for corpus in stored if corpus.remove()]
    n_bytes = sum(corpus.n_bytes for corpus in gone)
    stays = f"; {len(stored) - len(gone):,} in use stay" if len(gone) < len(stored) else ""
    return f"{folder}: deleted {len(gone):,} of {len(stored):,} corpora, {bytes_text(n_bytes)}{stays}"


def _show(folder: Path, stored: Sequence[CacheEntry], console: Console) -> None:
    total, most = bytes_text(sum(corpus.n_bytes for corpus in stored)), data_cache_bytes()
    bound = f"of at most {bytes_text(most)}" if most else "without a bound"
    console.print(f"{folder}: {len(stored):,} corpora, {total} {bound} ({MAX_SIZE_VARIABLE})", markup=False)
    if not stored:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("corpus", "size", "used", ""):
        table.add_column(column, no_wrap=True, justify="right" if column == "size" else "left")
    for corpus in reversed(stored):
        ago = f"{clock_text(time.time() - corpus.used_s)} ago"
        name = Text(printable(corpus.name))
        table.add_row(name, bytes_text(corpus.n_bytes), ago, "in use" if corpus.in_use() else "")
    console.print()
    console.print(table)

"""`cache` shows and empties all that is kept on this machine, not prepared text alone."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from common.assets import asset_store, assets_in_use
from common.errors import ConfigError
from node.trainer.cache_command import run_cache
from node.trainer.config import CacheConfig

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path))
    return tmp_path


async def told(capsys: pytest.CaptureFixture[str], *, clear: bool = False) -> list[str]:
    await run_cache(CacheConfig(clear=clear), asyncio.Event())
    return capsys.readouterr().out.splitlines()


async def test_an_empty_cache_says_what_may_come(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await told(capsys) == [
        f"{cache}: 0 corpora, 0 B of at most 10 GB (KILOHIVE_CACHE_MAX_SIZE)",
        "",
        f"{cache}/assets: 0 assets, 0 B of at most 50 GB (KILOHIVE_ASSETS_MAX_SIZE)",
    ]
    assert await told(capsys, clear=True) == [
        f"{cache}: deleted 0 of 0 corpora, 0 B",
        f"{cache}/assets: deleted 0 of 0 assets, 0 B",
    ]


async def test_tokenizers_and_models_are_shown_and_deleted_but_for_what_is_in_use(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOHIVE_ASSETS_MAX_SIZE", "0")
    old, used = asset_store().add(b"x" * 1000), asset_store().add(b"y" * 2000)
    os.utime(asset_store().path(old), (100, 100))
    with assets_in_use([used]):
        shown = await told(capsys)
        cleared = await told(capsys, clear=True)
    assert shown[2] == f"{cache}/assets: 2 assets, 3 kB without a bound (KILOHIVE_ASSETS_MAX_SIZE)"
    assert [line.split()[0] for line in shown[5:]] == [used.sha256[:12], old.sha256[:12]]
    assert [line.rstrip().endswith("in use") for line in shown[5:]] == [True, False]
    assert cleared[1] == f"{cache}/assets: deleted 1 of 2 assets, 1 kB; 1 in use stay"
    assert asset_store().holds(used)
    assert (await told(capsys, clear=True))[1] == f"{cache}/assets: deleted 1 of 1 assets, 2 kB"
    assert not asset_store().holds(used)


async def test_a_bound_that_is_none_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_ASSETS_MAX_SIZE", "much")
    with pytest.raises(ConfigError, match="KILOHIVE_ASSETS_MAX_SIZE: is 'much'"):
        await run_cache(CacheConfig(), asyncio.Event())

"""What `export` says before it has joined a run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.folders import FolderClaim, claimed
from node.export.command import run_export
from node.export.config import ExportConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "name the swarm with --join INVITE"),
        ({"shard_mb": 0}, "shard_mb: must be 1 or more, is 0"),
        ({"wait_for_replicas_s": -1.0}, "wait_for_replicas_s: must be 0 or more, is -1"),
        ({"out": Path("/")}, "--out: / cannot be made anew; name a folder that is not there yet"),
    ],
)
async def test_a_mistake_is_told_before_anything_is_begun(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        await run_export(ExportConfig(**{"out": tmp_path / "model", **settings}), asyncio.Event())
    assert not (tmp_path / "model.partial").exists()


async def test_two_exports_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    claim = FolderClaim(folder=tmp_path, file="model", lock=".model.lock", role="export", flag="--out")
    with claimed(claim), pytest.raises(ConfigError, match="model is in use by another `export`"):
        await run_export(ExportConfig(out=tmp_path / "model", join="kh1x"), asyncio.Event())

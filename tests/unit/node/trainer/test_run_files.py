"""A run names its tokenizer by its hash; the file comes from a person or from what this machine has kept."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from common.assets import asset_of, asset_store, stored_assets
from common.errors import ConfigError, DataError
from common.tokenizer import ByteTokenizer
from node.trainer.run_files import fetch_tokenizer, open_tokenizer
from protocol.manifest import Manifest, ModelConfig
from protocol.run_assets import DataConfig
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def run_with(data: bytes, vocab_size: int = 300) -> Manifest:
    asset = asset_of(data)
    return Manifest(
        name="tokens",
        model=ModelConfig(vocab_size=vocab_size),
        data=DataConfig(tokenizer=asset.sha256, tokenizer_bytes=asset.n_bytes),
    )


@pytest.fixture
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_file_that_is_given_is_kept_for_the_next_time(kept_in: Path) -> None:
    path = kept_in / "tokenizer.json"
    path.write_bytes(tiny_tokenizer())
    manifest = run_with(tiny_tokenizer())
    with pytest.raises(DataError, match=r"is not on this machine: name its file in the setting tokenizer"):
        open_tokenizer(manifest, "")
    assert open_tokenizer(manifest, str(path)).name == asset_of(tiny_tokenizer()).sha256
    path.unlink()
    assert open_tokenizer(manifest, "").name == asset_of(tiny_tokenizer()).sha256


def test_another_file_than_the_runs_is_refused_by_name(kept_in: Path) -> None:
    path = kept_in / "tokenizer.json"
    path.write_bytes(tiny_tokenizer(280))
    with pytest.raises(ConfigError, match=r"tokenizer\.json is [0-9a-f]{12}….*, the run's is .*give the run's own"):
        open_tokenizer(run_with(tiny_tokenizer()), str(path))
    with pytest.raises(ConfigError, match="the tokens of this run are bytes; leave it out"):
        open_tokenizer(Manifest(name="bytes"), str(path))


@pytest.mark.usefixtures("kept_in")
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    asset_store().add(tiny_tokenizer())
    with pytest.raises(DataError, match=r"has 300 tokens, the model of this run only 299"):
        open_tokenizer(run_with(tiny_tokenizer(), vocab_size=299), "")


def test_a_run_of_bytes_needs_no_file() -> None:
    assert isinstance(open_tokenizer(Manifest(name="bytes"), ""), ByteTokenizer)


async def test_a_runs_files_stay_on_this_machine_until_the_swarm_is_left(kept_in: Path) -> None:
    asset_store().add(tiny_tokenizer())
    at_leaving: list[Callable[[], object]] = []
    swarm = SimpleNamespace(manifest=run_with(tiny_tokenizer()), on_leave=at_leaving.append)
    await fetch_tokenizer(cast("Any", swarm), "", 1.0, asyncio.Event())
    (stored,) = stored_assets(kept_in / "cache" / "assets")
    assert not stored.remove()
    for leave in at_leaving:
        leave()
    assert stored.remove()

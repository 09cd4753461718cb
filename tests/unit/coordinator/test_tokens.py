"""The tokens of a new run: from a tokenizer's file into the manifest, and into the places where trainers look."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from common.assets import asset_of, asset_store
from common.errors import ConfigError, DataError, UnavailableError
from common.tokenizer import FileTokenizer
from coordinator.config import CoordinatorConfig, LocalConfig, check_same_run, manifest_of
from coordinator.tokens import check_training, keep_tokenizer, trained_tokenizer
from protocol.run_assets import DataConfig
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from protocol.manifest import Manifest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "given.json"
    path.write_bytes(tiny_tokenizer())
    return path


def manifest_with(file: Path | None) -> Manifest:
    return manifest_of(LocalConfig(tokenizer=file), owner="x", total_tokens=5)


def test_the_manifest_names_the_file_by_its_hash_and_has_as_many_tokens(file: Path) -> None:
    manifest, asset = manifest_with(file), asset_of(tiny_tokenizer())
    assert manifest.data == DataConfig(tokenizer=asset.sha256, tokenizer_bytes=asset.n_bytes)
    assert manifest.model.vocab_size == 300
    assert manifest_with(None).data == DataConfig()
    assert manifest_with(None).model.vocab_size == 256


@pytest.mark.parametrize(
    ("experts_per_token", "of_bytes", "of_tokens"), [(8, (8, 1), (2, 1)), (4, (4, 2), (2, 1)), (3, (3, 2), (1, 1))]
)
def test_the_gate_of_a_new_run_reads_fewer_tokens_where_each_says_more(
    file: Path, experts_per_token: int, of_bytes: tuple[int, int], of_tokens: tuple[int, int]
) -> None:
    for tokenizer, expected in ((None, of_bytes), (file, of_tokens)):
        config = LocalConfig(tokenizer=tokenizer, experts_per_token=experts_per_token)
        model = manifest_of(config, owner="x", total_tokens=5).model
        assert (model.gate_heads, model.gate_shortest) == expected


def test_a_run_of_an_older_version_keeps_its_gate_though_new_ones_have_another(file: Path) -> None:
    held = manifest_with(file)
    older = replace(held, model=replace(held.model, gate_heads=4, gate_shortest=2))
    check_same_run(LocalConfig(tokenizer=file), older, "here")
    with pytest.raises(ConfigError, match=r"model\.gate_heads: is 1, but the run in here has 4"):
        check_same_run(LocalConfig(tokenizer=file, gate_heads=1), older, "here")


def test_a_file_that_is_none_is_refused_before_anything_starts(tmp_path: Path, file: Path) -> None:
    file.write_bytes(b"{}")
    with pytest.raises(DataError, match=r"given\.json: is no tokenizer\.json"):
        manifest_with(file)
    with pytest.raises(ConfigError, match=r"gone\.json: cannot be read"):
        manifest_with(tmp_path / "gone.json")


def test_a_run_that_exists_keeps_its_tokenizer(file: Path) -> None:
    held = manifest_with(file)
    check_same_run(LocalConfig(tokenizer=file), held, "here")
    check_same_run(LocalConfig(), held, "here")
    check_same_run(LocalConfig(train_tokenizer=300), held, "here")
    file.write_bytes(tiny_tokenizer(280))
    with pytest.raises(ConfigError, match=r"(vocab_size|data\.tokenizer): is .*, but the run in here has"):
        check_same_run(LocalConfig(tokenizer=file), held, "here")


def test_the_file_is_kept_with_the_run_and_for_the_trainers_of_this_machine(tmp_path: Path, file: Path) -> None:
    manifest = manifest_with(file)
    keep_tokenizer(manifest, tmp_path / "run", file)
    file.unlink()
    assert manifest.data.tokenizer_asset is not None
    assert asset_store().find(manifest.data.tokenizer_asset) == tiny_tokenizer()
    asset_store().path(manifest.data.tokenizer_asset).unlink()
    keep_tokenizer(manifest, tmp_path / "run", None)
    assert asset_store().find(manifest.data.tokenizer_asset) == tiny_tokenizer()


def test_another_file_is_not_kept(tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = manifest_with(file)
    file.write_bytes(tiny_tokenizer(280))
    with pytest.raises(ConfigError, match=r"given\.json: is .*, the run's tokenizer is .*; give the run's own"):
        keep_tokenizer(manifest, tmp_path / "run", file)
    keep_tokenizer(manifest, tmp_path / "run", None)
    assert "add --tokenizer to put it there" in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"train_tokenizer": 256}, r"--train-tokenizer: must be from 257 to 262144, is 256"),
        ({"train_tokenizer": 262_145}, r"--train-tokenizer: must be from 257 to 262144, is 262145"),
        ({"train_tokenizer": -1}, r"--train-tokenizer: must be from 257"),
    ],
)
def test_a_vocabulary_that_cannot_be_trained_is_refused(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_training(CoordinatorConfig(**flags))


def test_a_tokenizer_is_given_or_trained_not_both(file: Path) -> None:
    check_training(CoordinatorConfig(tokenizer=file))
    with pytest.raises(ConfigError, match="--tokenizer and --train-tokenizer: give one of them"):
        check_training(CoordinatorConfig(tokenizer=file, train_tokenizer=300))


async def test_a_tokenizer_is_trained_in_a_process_of_its_own(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the swarm trains many tiny experts\n\n" * 500, encoding="utf-8")
    config = CoordinatorConfig(train_tokenizer=280)
    path = await trained_tokenizer(config, text, tmp_path, asyncio.Event())
    assert path is not None
    assert path == tmp_path / "tokenizer.json"
    assert FileTokenizer(path.read_bytes(), "trained").vocab_size == 280
    with pytest.raises(UnavailableError, match="the training of the tokenizer ended with exit code 1"):
        await trained_tokenizer(config, tmp_path / "gone.txt", tmp_path, asyncio.Event())
    stopped = asyncio.Event()
    stopped.set()
    assert await trained_tokenizer(replace(config, train_tokenizer=270), text, tmp_path, stopped) is None

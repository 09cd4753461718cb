"""`inspect` of folders that `export` wrote: runs of bytes, of pieces of words, and around a pretrained model."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from common.assets import asset_of
from common.errors import CheckpointError, ConfigError, DataError
from node.trainer.config import InspectConfig
from node.trainer.inspection import command
from node.trainer.inspection.command import run_inspect
from protocol.run_assets import DataConfig
from tests.support.exported import HASH, exported, flipped
from tests.support.swarm_parts import small_manifest
from tests.support.tiny_pretrained import kept_manifest, save_pretrained
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from protocol.manifest import Manifest

SENTENCES = {"swarm": "the swarm trains many tiny experts", "ducks": "many ducks swim in the pond and quack"}
SMALL: dict[str, Any] = {"tokens": 256, "ablate": 1, "top": 2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, sentence in SENTENCES.items():
        rows = [json.dumps({"text": f"{number}: {sentence}, {sentence}, {number}"}) for number in range(400)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    exported(tmp_path / "model")
    return tmp_path / "model"


def of_bytes(_: Path) -> tuple[Manifest, bytes | None]:
    return small_manifest(model=HASH), None


def of_pairs(_: Path) -> tuple[Manifest, bytes | None]:
    asset = asset_of(tiny_tokenizer())
    data = DataConfig(tokenizer=asset.sha256, tokenizer_bytes=asset.n_bytes)
    return small_manifest(model={"gate": "topk", "vocab_size": 300}, data=data), tiny_tokenizer()


def around_a_model(tmp_path: Path) -> tuple[Manifest, bytes | None]:
    pretrained = save_pretrained(tmp_path / "pretrained")
    return kept_manifest(pretrained, expert_kind="ffn"), (pretrained / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("run", [of_bytes, of_pairs, around_a_model])
async def test_every_kind_of_run_is_inspected(
    run: Any, tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, tokenizer = run(tmp_path)
    exported(tmp_path / "model", manifest, tokenizer)
    files: dict[str, Any] = {"json": tmp_path / "new" / "found.json", "plot": tmp_path / "new" / "found.svg"}
    await run_inspect(InspectConfig(export=tmp_path / "model", data=texts, **SMALL, **files), asyncio.Event())
    text = "".join((texts / f"{name}.jsonl").read_text() for name in SENTENCES)
    shown, told = capsys.readouterr().out, json.loads(files["json"].read_text())
    assert shown.startswith(str(tmp_path)[:20])
    assert told["topics"] == ["ducks.jsonl", "swarm.jsonl"]
    assert told["tokens"] == 256
    for layer in told["layers"]:
        assert f"layer {layer['layer']}:" in shown
        assert sum(expert["pairs"] for expert in layer["experts"]) == 256 * 2
        assert sum(expert["without"] is not None for expert in layer["experts"]) == 2
        busiest = layer["experts"][0]
        assert busiest["tokens"]
        assert all(0.0 < token["share"] <= 1.0 <= token["times"] for token in busiest["tokens"])
        contexts = ["".join(context.values()) for context in busiest["contexts"]]
        of_one_document = [context for context in contexts if "\n" not in context]
        assert of_one_document
        assert all(context in text for context in of_one_document)
    assert files["plot"].read_bytes().startswith(b"<?xml")
    assert "taken away" in shown


async def test_one_seed_finds_the_same_again(folder: Path, texts: Path, tmp_path: Path) -> None:
    told = []
    for name in ("first", "second"):
        await run_inspect(InspectConfig(export=folder, data=texts, json=tmp_path / name, **SMALL), asyncio.Event())
        told.append((tmp_path / name).read_bytes())
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tokens": 0}, "--tokens: must be 1 or more, is 0"),
        ({"top": 0}, "--top: must be 1 or more, is 0"),
        ({"top": 1001}, "--top: must be at most 1,000, is 1,001"),
        ({"ablate": -1}, "--ablate: must be 0 or more, is -1"),
        ({"ablate": 257}, "--ablate: must be at most 256, is 257"),
        ({"seed": -1}, "seed: must be 0 or more, is -1"),
        ({"threads": 0}, "--threads: must be 1 or more, is 0"),
        ({"tokens": 10**9}, "4,000,000,000 choices of experts in this model, more than 33,554,432; look at 8,388,608"),
        ({"run_id": "run"}, "--export: names a model that needs no swarm"),
    ],
)
async def test_a_wrong_setting_is_named(folder: Path, texts: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        await run_inspect(InspectConfig(export=folder, data=texts, **settings), asyncio.Event())


@pytest.mark.parametrize("flag", ["json", "plot"])
async def test_a_file_that_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("")
    for path, sentence in (
        (tmp_path, f"--{flag}: {tmp_path} is a folder"),
        (tmp_path / "file" / "x", "cannot use folder"),
    ):
        setting: dict[str, Any] = {flag: path}
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            await run_inspect(InspectConfig(export=tmp_path / "no such model", **setting), asyncio.Event())


async def test_a_text_that_is_shorter_than_a_window_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    with pytest.raises(DataError, match=r"short.jsonl: 5 held-out tokens are fewer than one window of 17"):
        await run_inspect(InspectConfig(export=folder, data=tmp_path / "short.jsonl"), asyncio.Event())


async def test_a_broken_folder_is_refused_and_the_file_named(folder: Path, texts: Path) -> None:
    with flipped(folder / "config.json"), pytest.raises(CheckpointError, match=r"config.json: is damaged"):
        await run_inspect(InspectConfig(export=folder, data=texts), asyncio.Event())
    with pytest.raises(CheckpointError, match="nothing-here"):
        await run_inspect(InspectConfig(export=folder / "nothing-here", data=texts), asyncio.Event())


async def test_a_stop_ends_it_between_two_batches_and_is_no_error(
    folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, loop, batches = asyncio.Event(), asyncio.get_running_loop(), []
    stepping = command._stepping

    def stepping_twice(*arguments: Any) -> Any:
        step = stepping(*arguments)

        def stepped() -> None:
            batches.append(1)
            if len(batches) == 2:
                loop.call_soon_threadsafe(stop.set)
                asyncio.run_coroutine_threadsafe(stop.wait(), loop).result(10)
            step()

        return stepped

    monkeypatch.setattr(command, "_stepping", stepping_twice)
    await run_inspect(InspectConfig(export=folder, data=texts, json=tmp_path / "found.json", **SMALL), stop)
    assert len(batches) == 2
    assert not capsys.readouterr().out
    assert not (tmp_path / "found.json").exists()


async def test_long_work_tells_how_far_it_is_and_in_the_end_has_done_all(
    folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(command, "SHOWN_AFTER_S", 0.0)
    monkeypatch.setattr("common.progress.LOG_EVERY_S", 0.0)
    monkeypatch.setattr("common.progress._Log.every_s", 0.0)
    with caplog.at_level("INFO"):
        await run_inspect(InspectConfig(export=folder, data=texts, **SMALL), asyncio.Event())
    told = [record.message for record in caplog.records if "held-out text with and without" in record.message]
    assert told[-1] == "reading held-out text with and without experts: 100%"

"""A run around a pretrained model: what its manifest says, with which defaults, and what is kept for trainers."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest

from common.assets import asset_of, asset_store
from common.command_line import parse
from common.errors import ConfigError
from common.settings import configured
from coordinator.config import LocalConfig, RunConfig, check_same_run, manifest_of
from coordinator.local import LocalSwarm
from coordinator.pretrained import described, keep_pretrained
from protocol.manifest import Manifest
from run_node import COMMANDS
from tests.support.tiny_pretrained import N_TOKENS, save_pretrained

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    described.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(tmp_path_factory.mktemp("model"))


def config_of(folder: Path, **changes: Any) -> LocalConfig:
    return configured(LocalConfig, {"model": str(folder), "layers": 3, "experts": 48, "context": 32, **changes})


def test_the_manifest_names_the_models_files_its_tokenizer_and_its_last_layers(folder: Path) -> None:
    manifest = manifest_of(config_of(folder), owner="x", total_tokens=5)
    files = {file.name: file for file in manifest.pretrained.files}
    assert files["model.safetensors"].asset == asset_of((folder / "model.safetensors").read_bytes())
    assert manifest.pretrained.attach == (1, 2, 3)
    assert manifest.data.tokenizer_asset is not None
    model = manifest.model
    assert (model.trunk, model.d_model, model.vocab_size, model.n_layers) == ("hf", 16, N_TOKENS, 3)
    assert Manifest.from_toml(manifest.to_toml()) == manifest


def test_such_a_run_has_defaults_of_its_own_and_flags_win_over_them(folder: Path) -> None:
    model = manifest_of(config_of(folder), owner="x", total_tokens=5).model
    assert (model.expert_kind, model.expert_hidden, model.gate, model.smear) == ("lora", 2, "topk", 0)
    model = manifest_of(config_of(folder, expert_hidden=4, experts_per_token=2), owner="x", total_tokens=5).model
    assert (model.expert_hidden, model.experts_per_token) == (4, 2)


def read(name: str, *arguments: str) -> Any:
    page = next(command for command in COMMANDS if command.name == name)
    return parse(page, arguments, "kilohive").config


def test_a_flag_wins_over_the_models_preset_also_where_it_gives_the_usual_default(tmp_path: Path) -> None:
    assert read("local", "--steps", "400") == LocalConfig()
    left_out = read("local", "--model", "smollm2")
    assert (left_out.name, left_out.steps, left_out.batch, left_out.lr) == ("smollm2", 110, 1, 0.03)
    given = read("local", "--model", "smollm2", "--name", "local", "--batch", "8", "--lr", "8e-3", "--gate", "hash")
    assert given == replace(left_out, name="local", batch=8, lr=8e-3, gate="hash")
    file = tmp_path / "run.toml"
    file.write_text("model = 'smollm2'\nlayers = 2\nsmear = 2\n")
    of_file = read("coordinator", "--config", str(file), "--expert-hidden", "32")
    assert (of_file.layers, of_file.smear, of_file.expert_hidden, of_file.gate) == (2, 2, 32, "topk")
    given = read("coordinator", "--model", "smollm2", "--set", "gate_score=softmax")
    assert (given.gate_score, given.gate_reads) == ("softmax", "hidden")


def test_what_local_hands_on_to_its_coordinator_is_what_it_was_given(folder: Path, tmp_path: Path) -> None:
    config = read("local", "--model", str(folder), "--layers", "2", "--gate", "hash", "--out", str(tmp_path))
    words = LocalSwarm(config, asyncio.Event(), ())._coordinator_spec().argv
    at_coordinator = read("coordinator", *[word for word in words[1:] if word != "--stop-on-stdin-eof"])
    assert all(getattr(at_coordinator, field.name) == getattr(config, field.name) for field in fields(RunConfig))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2", "smollm2"),
        ("models/Smol LM2-1.7B/", "Smol-LM2-1-7B"),
        ("hive/tiny.v2@main", "tiny-v2"),
        ("/data/tiny.gguf", "tiny"),
        ("..", "model"),
    ],
)
def test_a_run_is_called_after_its_model_unless_it_has_a_name(model: str, name: str) -> None:
    assert configured(LocalConfig, {"model": model}).name == name
    assert configured(LocalConfig, {"model": model, "name": "mine"}).name == "mine"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 5, "experts": 50}, r"--layers: must be from 1 to the model's 4, is 5"),
        ({"context": 65}, r"--context: the model reads at most 64 tokens, is 65"),
        ({"train_tokenizer": 300}, r"--model: brings its tokenizer along; leave out --tokenizer"),
        ({"d_model": 128}, r"--model: brings its width and its attention along; leave out --d-model and --heads"),
        ({"heads": 4}, r"--model: brings its width and its attention along; leave out --d-model and --heads"),
        ({"model": "nowhere"}, r"--model nowhere: is not there"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(folder: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        manifest_of(config_of(folder, **changes), owner="x", total_tokens=5)


def test_a_run_that_exists_keeps_its_model(folder: Path, tmp_path: Path) -> None:
    held = manifest_of(config_of(folder), owner="x", total_tokens=5)
    check_same_run(config_of(folder), held, "here")
    check_same_run(configured(LocalConfig, {"model": str(folder), "context": 32}), held, "here")
    with pytest.raises(ConfigError, match=r"model\.n_layers: is 2, but the run in here has 3"):
        check_same_run(config_of(folder, layers=2), held, "here")
    other = save_pretrained(tmp_path / "other", "qwen2")
    with pytest.raises(
        ConfigError,
        match=r"(data\.tokenizer|pretrained\.files): is .*, but the run in here has .*, which cannot change",
    ):
        check_same_run(config_of(other), held, "here")


def test_a_run_keeps_the_tokenizer_that_an_older_version_made_of_the_same_files(folder: Path, tmp_path: Path) -> None:
    made = manifest_of(config_of(folder), owner="x", total_tokens=5)
    older = asset_of(b"an older one")
    held = replace(made, data=replace(made.data, tokenizer=older.sha256, tokenizer_bytes=older.n_bytes))
    check_same_run(config_of(folder), held, "here")
    (tmp_path / "tokenizer.json").write_bytes(b"an older one")
    keep_pretrained(held, tmp_path, str(folder))
    assert (tmp_path / "tokenizer.json").read_bytes() == b"an older one"


def test_files_and_tokenizer_are_kept_for_the_trainers_of_this_machine(folder: Path, tmp_path: Path) -> None:
    manifest = manifest_of(config_of(folder), owner="x", total_tokens=5)
    keep_pretrained(manifest, tmp_path / "run", str(folder))
    assert all(asset_store().holds(asset) for asset in manifest.assets)
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    keep_pretrained(manifest, tmp_path / "run", "")
    other = save_pretrained(tmp_path / "other", "qwen2")
    with pytest.raises(ConfigError, match=r"has other files than the model of the run in"):
        keep_pretrained(manifest, tmp_path / "run", str(other))

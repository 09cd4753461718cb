"""A run around a pretrained model: what its manifest says, with which defaults, and what is kept for trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from common.assets import asset_of, asset_store
from common.errors import ConfigError
from coordinator.config import CoordinatorConfig, LocalConfig, check_same_run, manifest_of
from coordinator.pretrained import described, keep_pretrained, with_defaults
from protocol.manifest import Manifest
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
    return LocalConfig(**{"model": str(folder), "layers": 3, "experts": 48, "context": 32, **changes})


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
    assert with_defaults(LocalConfig()) == LocalConfig()
    assert with_defaults(config_of(folder)).batch == 1
    assert with_defaults(config_of(folder, batch=5)).batch == 5
    assert with_defaults(CoordinatorConfig(model=str(folder))).lr == 0.03


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
    assert with_defaults(LocalConfig(model=model)).name == name
    assert with_defaults(LocalConfig(model=model, name="mine")).name == "mine"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 5, "experts": 50}, r"--layers: must be from 1 to the model's 4, is 5"),
        ({"context": 65}, r"--context: the model reads at most 64 tokens, is 65"),
        ({"train_tokenizer": 300}, r"--model: brings its tokenizer along; leave out --tokenizer"),
        ({"model": "nowhere"}, r"--model nowhere: is not there"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(folder: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        manifest_of(config_of(folder, **changes), owner="x", total_tokens=5)


def test_a_run_that_exists_keeps_its_model(folder: Path, tmp_path: Path) -> None:
    held = manifest_of(config_of(folder), owner="x", total_tokens=5)
    check_same_run(config_of(folder), held, "here")
    other = save_pretrained(tmp_path / "other", "qwen2")
    with pytest.raises(
        ConfigError,
        match=r"(data\.tokenizer|pretrained\.files): is .*, but the run in here has .*, which cannot change",
    ):
        check_same_run(config_of(other), held, "here")


def test_files_and_tokenizer_are_kept_for_the_trainers_of_this_machine(folder: Path, tmp_path: Path) -> None:
    manifest = manifest_of(config_of(folder), owner="x", total_tokens=5)
    keep_pretrained(manifest, tmp_path / "run", str(folder))
    assert all(asset_store().holds(asset) for asset in manifest.assets)
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    keep_pretrained(manifest, tmp_path / "run", "")
    other = save_pretrained(tmp_path / "other", "qwen2")
    with pytest.raises(ConfigError, match=r"has other files than the model of the run in"):
        keep_pretrained(manifest, tmp_path / "run", str(other))

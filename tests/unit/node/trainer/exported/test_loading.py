"""An exported folder in this process: the same model, and one sentence for whatever is wrong with it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from common.assets import asset_of
from common.errors import CheckpointError, ConfigError
from kilohive import load_model
from node.trainer.config import EvaluateConfig, SampleConfig
from node.trainer.evaluation import run_evaluate
from node.trainer.exported.layout import CODE
from node.trainer.exported.loading import open_export
from node.trainer.exported.sums import SUMS, read_sums
from node.trainer.sample_command import run_sample
from protocol.run_assets import DataConfig
from tests.support.exported import HASH, exported, flipped, sealed
from tests.support.swarm_parts import small_manifest
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


CPU = torch.device("cpu")
SHARD = "model-00001-of-00001.safetensors"


def some_ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    exported(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("shape", [HASH, {"gate": "product_key"}, {"gate": "topk", "expert_kind": "lora"}])
@torch.no_grad()
def test_a_folder_gives_the_model_that_was_written_whatever_this_torch_draws(
    tmp_path: Path, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, manifest = exported(tmp_path / "model", small_manifest(model=shape, seed=5))
    drawn = torch.randint

    def otherwise(*arguments: Any, **keywords: Any) -> torch.Tensor:
        torch.rand(1, generator=keywords["generator"])
        return drawn(*arguments, **keywords)

    ids = some_ids()
    monkeypatch.setattr(torch, "randint", otherwise)
    found = load_model(tmp_path / "model")
    assert not found.training
    assert bool((found(ids) == model(ids)).all())
    config = open_export(tmp_path / "model", CPU).config
    assert (config.run_id, config.trunk_version, config.manifest.seed) == (manifest.run_id, 7, 5)


def test_a_loaded_model_can_go_on_training(folder: Path) -> None:
    exported_model = open_export(folder, CPU)
    before = exported_model.experts.blocks[0][0].params["w_in"].clone()
    model = exported_model.model.train()
    model(some_ids()).square().mean().backward()
    assert not torch.equal(exported_model.experts.blocks[0][0].params["w_in"], before)


@pytest.mark.parametrize("name", [SHARD, "config.json", "README.md", "model.safetensors.index.json", "tokenizer.json"])
def test_a_flipped_bit_is_refused_and_the_file_named(folder: Path, name: str) -> None:
    with flipped(folder / name), pytest.raises(CheckpointError, match=f"{re.escape(name)}: is damaged"):
        load_model(folder)
    load_model(folder)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (SHARD, b"", f"{SHARD}: is no safetensors file"),
        (SHARD, b"\xff" * 400, f"{SHARD}: is no safetensors file"),
        ("config.json", b"{", "config.json: is not JSON"),
        ("config.json", b"\xff\xfe", "config.json: is not JSON"),
        ("config.json", b"[" * 100_000, "config.json: is not JSON"),
        ("config.json", b"[]", "config.json: is not that of a model that `export` wrote"),
        ("config.json", b'{"model_type": "llama"}', "config.json: is not that of a model that `export` wrote"),
        ("model.safetensors.index.json", b"{}", "is not the index of files that `export` wrote"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../x"}}', "names '../x', which SHA256SUMS does not"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}', "names '3', which SHA256SUMS does not"),
    ],
)
def test_files_that_were_replaced_are_refused_in_one_sentence(folder: Path, name: str, data: bytes, words: str) -> None:
    (folder / name).write_bytes(data)
    sealed(folder)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 64}, "tensor layers.0.moe.experts.10.w_in is missing"),
        ({"hidden_size": 16_384}, "is I8 [256, 16], must be I8 [256, 16384]"),
        ({"num_hidden_layers": 1}, "belongs to no model of this configuration"),
        ({"vocab_size": 512}, "model.vocab_size: must be 256 where tokens are bytes"),
        ({"hidden_size": -1}, "model.d_model: must be from 1"),
        ({"hidden_size": "16"}, "model.d_model: must be int"),
        ({"gate": "router"}, "model.gate: is 'router'"),
        ({"dtype": "float16"}, "is not that of a model that `export` wrote"),
        ({"kilohive": None}, "is not that of a model that `export` wrote"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_before_memory_is_taken(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, **changes}))
    sealed(folder)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_model(folder)


def test_a_number_that_is_not_finite_is_refused(folder: Path) -> None:
    exported_model = open_export(folder, CPU)
    tensors = {"head_VD": torch.full((256, 16), torch.nan)}
    assert exported_model.model.get_parameter("head_VD").shape == (256, 16)
    save_file(tensors, folder / "x.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["head_VD"] = "x.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sealed(folder)
    with pytest.raises(CheckpointError, match=r"x.safetensors: tensor head_VD holds a number that is not finite"):
        load_model(folder)


@pytest.mark.parametrize("name", [SUMS, SHARD, "config.json"])
def test_a_file_that_is_gone_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_model(folder)


def test_hashes_that_are_none_are_refused(folder: Path) -> None:
    (folder / SUMS).write_text("../../etc/passwd\n")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: '../../etc/passwd' is not a SHA-256 and a name"):
        load_model(folder)
    (folder / SUMS).write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(CheckpointError, match="is not a SHA-256 and a name"):
        load_model(folder)


def test_a_folder_with_all_code_in_one_file_is_read_like_any_other(folder: Path) -> None:
    """Such are those of before there were several files."""
    expected = load_model(folder)(some_ids())
    for name in CODE["transformer"][1:]:
        (folder / name).unlink()
    (folder / CODE["transformer"][0]).write_text("# as it was then\n")
    sealed(folder)
    torch.testing.assert_close(load_model(folder)(some_ids()), expected)


def test_all_code_is_in_the_folder_and_has_its_hash(folder: Path) -> None:
    assert set(CODE["transformer"]) <= read_sums(folder).keys()
    assert {path.name for path in folder.iterdir()} == {*read_sums(folder), SUMS}
    imported = {
        name for file in CODE["transformer"] for name in re.findall(r"from \.(\w+) import", (folder / file).read_text())
    }
    assert {f"{name}.py" for name in imported} == set(CODE["transformer"][1:])


async def test_sample_and_evaluate_use_the_folder_without_a_swarm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    text, folder, asset = tmp_path / "text.txt", tmp_path / "model", asset_of(tiny_tokenizer())
    text.write_text("\n\n".join(f"Row {n}: the square of {n % 50} is {(n % 50) ** 2}." for n in range(2000)))
    data = DataConfig(tokenizer=asset.sha256, tokenizer_bytes=asset.n_bytes)
    manifest = small_manifest(model={**HASH, "vocab_size": 300}, data=data)
    exported(folder, manifest, tiny_tokenizer())
    stop = asyncio.Event()
    await run_sample(SampleConfig(export=folder, prompt="the swarm", n_tokens=5, n=2), stop)
    assert "[2 of 2]\nthe swarm" in capsys.readouterr().out
    await run_evaluate(EvaluateConfig(export=folder, data=text, n_bytes=2000), stop)
    assert "at version 7 of its trunk" in capsys.readouterr().out


@pytest.mark.parametrize(("run", "config"), [(run_sample, SampleConfig), (run_evaluate, EvaluateConfig)])
async def test_both_refuse_a_damaged_folder_and_one_beside_a_swarm(folder: Path, run: Any, config: Any) -> None:
    with flipped(folder / SHARD), pytest.raises(CheckpointError, match=SHARD):
        await run(config(export=folder), asyncio.Event())
    with pytest.raises(ConfigError, match="--export: names a model that needs no swarm"):
        await run(config(export=folder, join="swarm.toml"), asyncio.Event())

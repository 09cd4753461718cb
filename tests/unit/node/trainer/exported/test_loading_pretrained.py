"""An exported folder around a pretrained model, read again in this process: the same model, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import CheckpointError
from kilohive import load_model
from node.model.generation import Generation, Prompt
from node.model.next_token import GenerationConfig
from node.model.pretrained import PretrainedTrunk
from node.model.pretrained_files import language_model
from node.trainer.config import EvaluateConfig, SampleConfig
from node.trainer.evaluation import run_evaluate
from node.trainer.exported.layout import CODE
from node.trainer.exported.loading import open_export
from node.trainer.exported.sums import SUMS, read_sums
from node.trainer.sample_command import run_sample
from tests.support.exported import exported, flipped, sealed
from tests.support.tiny_pretrained import N_TOKENS, kept_manifest, save_chat_model

if TYPE_CHECKING:
    from pathlib import Path

    from node.model.trunk import Trunk

CPU = torch.device("cpu")
CLOSE: Any = {"atol": 1e-5, "rtol": 1e-5}
CODES: dict[str, Any] = {"gate_reads": "tokens", "gate_heads": 2, "experts_per_token": 4}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    language_model.cache_clear()


def written(folder: Path, model: dict[str, Any] | None = None, **run: Any) -> Trunk:
    """A run's trunk, whose export is in `folder`; its pretrained model is `pretrained` beside that."""
    source = save_chat_model(folder.parent / "pretrained", **(model or {}))
    trunk, _ = exported(folder, kept_manifest(source, **run), (source / "tokenizer.json").read_bytes())
    return trunk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    written(tmp_path / "model")
    return tmp_path / "model"


def some_ids() -> torch.Tensor:
    return torch.randint(0, N_TOKENS, (2, 16), generator=torch.Generator().manual_seed(1))


def greedy(trunk: Trunk) -> list[int]:
    config = GenerationConfig(max_new_tokens=6, temperature=0)
    return [new.token for step in Generation(trunk, [Prompt(ids=[1, 2, 3], config=config)]) for new in step]


@pytest.mark.parametrize(
    ("model", "run"),
    [
        ({}, {}),
        ({"kind": "qwen2"}, CODES),
        ({}, {"gate": "hash", **CODES, "gate_shortest": 1, "unfreeze": ("model.norm",)}),
        ({"tie_word_embeddings": True}, {}),
        ({"tie_word_embeddings": True}, {"unfreeze": ("model.embed_tokens",)}),
        ({"dtype": torch.bfloat16}, {"dtype": "bf16"}),
        ({"dtype": torch.bfloat16}, {"dtype": "fp32"}),
    ],
)
@torch.no_grad()
def test_a_folder_gives_the_model_that_was_written_without_the_pretrained_files(
    tmp_path: Path, model: dict[str, Any], run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = written(tmp_path / "model", model, **run)
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "empty"))
    found = load_model(tmp_path / "model")
    assert isinstance(found, PretrainedTrunk)
    assert isinstance(trunk, PretrainedTrunk)
    assert not found.training
    weights = found.language_model.state_dict()
    expected = {name: t for name, t in trunk.language_model.state_dict().items() if ".moe." not in name}
    for name, weight in expected.items():
        assert weights[name].dtype == weight.dtype
        assert torch.equal(weights[name], weight), name
    torch.testing.assert_close(found(some_ids()), trunk(some_ids()), **CLOSE)
    assert greedy(found) == greedy(trunk)


def test_a_loaded_model_can_go_on_training(folder: Path) -> None:
    exported_model = open_export(folder, CPU)
    exported_model.model.train()(some_ids()).square().mean().backward()
    for of_layer in exported_model.experts.blocks.values():
        assert sum(float(block.learnt_E.sum()) for block in of_layer) == some_ids().numel() * 2
    assert all(p.grad is not None for p in exported_model.model.parameters())


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "config.json", *CODE["hf"]])
def test_a_flipped_bit_is_refused_and_the_file_named(folder: Path, name: str) -> None:
    with flipped(folder / name), pytest.raises(CheckpointError, match=f"{re.escape(name)}: is damaged"):
        load_model(folder)


@pytest.mark.parametrize(
    ("of_pretrained", "words"),
    [
        (
            {"model_type": "nothing"},
            "the pretrained model: no causal language model that transformers loads: Unrecognized model",
        ),
        ({"model_type": 3}, "the pretrained model: no causal language model that transformers loads"),
        ({"model_type": None}, "the pretrained model: no causal language model that transformers loads"),
        (
            {"hidden_size": "16"},
            "the pretrained model: no causal language model that transformers loads: Validation error",
        ),
        ({"hidden_size": 32}, "model.d_model: is 16 in the manifest, the pretrained model has 32"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, must be from 1 to 256"),
        ({"num_hidden_layers": 2}, "pretrained.attach: names layer 3, the pretrained model has 2"),
        ({"num_hidden_layers": 5}, "tensor language_model.model.layers.4.input_layernorm.weight is missing"),
        ({"intermediate_size": 1 << 40}, "must be F32 [16, 1099511627776]"),
        ({"tie_word_embeddings": True}, "tensor language_model.lm_head.weight belongs to no model"),
        ({"model_type": "gpt2"}, "belongs to no model of this configuration"),
    ],
)
def test_a_pretrained_model_that_does_not_fit_is_refused_before_memory_is_taken(
    folder: Path, of_pretrained: dict[str, Any], words: str
) -> None:
    table = json.loads((folder / "config.json").read_text())
    table["pretrained"] |= of_pretrained
    (folder / "config.json").write_text(json.dumps(table))
    sealed(folder)
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("of_run", "words"),
    [
        ({"pretrained": 3}, "is not that of a model that `export` wrote"),
        ({"pretrained": {}}, "is not that of a model that `export` wrote"),
        ({"pretrained": {"attach": [1, 3], "files": [], "dtype": "fp32"}}, "pretrained.files: must be 1 to 32"),
        ({"context": 0}, "model.context: must be from 1"),
        ({"context": 65}, "model.context: is 65, the pretrained model reads at most 64 tokens"),
        ({"format": 9}, "is not that of a model that `export` wrote"),
    ],
)
def test_what_the_folder_says_of_the_run_is_checked(folder: Path, of_run: dict[str, Any], words: str) -> None:
    table = json.loads((folder / "config.json").read_text())
    table["kilohive"] |= of_run
    (folder / "config.json").write_text(json.dumps(table))
    sealed(folder)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_model(folder)


def test_the_code_is_not_needed_to_read_a_folder(folder: Path) -> None:
    ids_BT = torch.arange(6)[None]
    with torch.no_grad():
        logits_BTV = load_model(folder)(ids_BT)
        for name in CODE["hf"]:
            (folder / name).unlink()
        sealed(folder)
        assert torch.equal(load_model(folder)(ids_BT), logits_BTV)


def test_all_code_is_in_the_folder_and_has_its_hash(folder: Path) -> None:
    assert set(CODE["hf"]) <= read_sums(folder).keys()
    assert {path.name for path in folder.iterdir()} == {*read_sums(folder), SUMS}
    imported = {name for file in CODE["hf"] for name in re.findall(r"from \.(\w+) import", (folder / file).read_text())}
    assert {f"{name}.py" for name in imported} == set(CODE["hf"][1:])


async def test_sample_and_evaluate_use_the_folder_without_a_swarm(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Row {n}: the square of {n % 50} is {(n % 50) ** 2}." for n in range(2000)))
    stop = asyncio.Event()
    await run_sample(SampleConfig(export=folder, prompt="the swarm", n_tokens=5, n=2), stop)
    assert "[2 of 2]\nthe swarm" in capsys.readouterr().out
    await run_evaluate(EvaluateConfig(export=folder, data=text, n_bytes=2000), stop)
    assert "at version 7 of its trunk" in capsys.readouterr().out

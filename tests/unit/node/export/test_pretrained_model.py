"""What an export takes along of a pretrained model: its weights, its tokens, and how a chat is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.assets import asset_store
from common.errors import DataError
from node.export.pretrained_model import PretrainedParts
from node.model.pretrained_files import language_model, loaded_sparingly
from node.trainer.exported.layout import PRETRAINED, PretrainedPiece, parts_of
from tests.support.exported import exported, read_by_transformers
from tests.support.tiny_gguf import N_LAYERS, gguf_manifest
from tests.support.tiny_pretrained import CHAT_TEMPLATE, END, N_TOKENS, kept_manifest, save_chat_model, save_pretrained

if TYPE_CHECKING:
    from pathlib import Path

    from protocol.manifest import Manifest

CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    language_model.cache_clear()


def read_tokenizer(folder: Path) -> Any:
    """What `AutoTokenizer` makes of the folder, without the folder's code, which is about the model alone."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def pieces(manifest: Manifest) -> dict[str, torch.Tensor]:
    """All that is taken of the pretrained model, under its own names."""
    read = PretrainedParts(manifest)
    parts = [part for part in parts_of(manifest, read.outline) if isinstance(part.id, PretrainedPiece)]
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        tensors = read.tensors(part)
        assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
            t.name: (t.shape, t.dtype) for t in part.tensors
        }
        found |= {name.removeprefix(PRETRAINED): t for name, t in tensors.items()}
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_those_that_the_run_computes_with_whatever_their_files_hold(
    tmp_path: Path, stored: torch.dtype, dtype: Any
) -> None:
    manifest = kept_manifest(save_chat_model(tmp_path / "model", dtype=stored), dtype=dtype)
    found = pieces(manifest)
    expected = language_model(manifest.pretrained).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


def test_weights_of_half_the_size_stay_so_until_they_are_written(tmp_path: Path) -> None:
    manifest = kept_manifest(save_chat_model(tmp_path / "model", dtype=torch.bfloat16))
    assert loaded_sparingly(manifest.pretrained).dtype == torch.bfloat16
    assert pieces(manifest)["model.norm.weight"].dtype == torch.float32


def test_a_piece_is_no_larger_than_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.trainer.exported.layout.PIECE_BYTES", 4096)
    manifest = kept_manifest(save_chat_model(tmp_path / "model"))
    parts = [p for p in parts_of(manifest, PretrainedParts(manifest).outline) if isinstance(p.id, PretrainedPiece)]
    assert len(parts) > 10
    assert all(part.n_bytes <= 4096 or len(part.tensors) == 1 for part in parts)
    assert [str(part.id) for part in parts[:2]] == ["pretrained/0", "pretrained/1"]


@torch.no_grad()
def test_a_gguf_is_unpacked_and_its_template_leaves_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # else the library's bar leaves a thread behind
    manifest = gguf_manifest(tmp_path / "gguf", unfreeze=("model.norm",))
    trunk, _ = exported(tmp_path / "model", manifest, asset_store().find(manifest.assets[0]))
    ids = torch.arange(40)[None, :20]
    model = read_by_transformers(tmp_path / "model")
    torch.testing.assert_close(model(ids).logits, trunk(ids), atol=1e-5, rtol=1e-5)
    assert len(model.language_model.model.layers) == N_LAYERS
    table = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in json.dumps(table)
    assert str(tmp_path) not in json.dumps(table)
    tokenizer = read_tokenizer(tmp_path / "model")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == (
        f"<user>Hello{END}<assistant>"
    )
    assert (model.generation_config.eos_token_id, tokenizer.eos_token_id) == (N_TOKENS - 1, N_TOKENS - 1)


def test_tokens_that_play_a_part_and_the_template_are_those_of_the_model(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "pretrained")
    manifest = kept_manifest(folder)
    read = PretrainedParts(manifest)
    tokens = read.tokens
    assert tokens.special == {"eos_token": END, "pad_token": END}
    assert (tokens.chat_template, tokens.end, read.max_tokens) == (CHAT_TEMPLATE, N_TOKENS - 1, 64)
    exported(tmp_path / "model", manifest, (folder / "tokenizer.json").read_bytes())
    ours, theirs = read_tokenizer(tmp_path / "model"), AutoTokenizer.from_pretrained(folder)
    for text in ("the swarm", f"Hello{END}", "żółw"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    asked: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True}
    assert ours.apply_chat_template(CHAT, **asked) == theirs.apply_chat_template(CHAT, **asked)
    batch = ours(["a", "a longer one"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert ours.model_max_length == 64


def test_of_several_templates_the_usual_one_is_taken(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "pretrained")
    (folder / "chat_template.jinja").unlink()
    table = json.loads((folder / "tokenizer_config.json").read_text())
    table["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    assert PretrainedParts(kept_manifest(folder)).tokens.chat_template == CHAT_TEMPLATE


def test_tokens_that_the_library_adds_of_its_own_and_the_model_does_not_know_stay_behind(tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path / "pretrained", "qwen2")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id >= N_TOKENS
    read = PretrainedParts(kept_manifest(folder))
    assert (read.tokens.special, read.tokens.end, read.tokens.chat_template) == ({}, None, None)
    assert "eos_token_id" not in read.generation()


def test_how_text_is_drawn_is_as_the_models_files_say(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "pretrained")
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.3, "eos_token_id": [7, N_TOKENS - 1]})
    )
    exported(tmp_path / "model", kept_manifest(folder), (folder / "tokenizer.json").read_bytes())
    told = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert told == {
        **told,
        "do_sample": True,
        "temperature": 0.3,
        "eos_token_id": [7, N_TOKENS - 1],
        "max_new_tokens": 16,
    }


def test_a_run_whose_files_are_gone_or_do_not_fit_is_refused_in_one_sentence(tmp_path: Path) -> None:
    manifest = kept_manifest(save_chat_model(tmp_path / "model"))
    other = kept_manifest(tmp_path / "model", d_model=32)
    with pytest.raises(DataError, match=r"model\.d_model: is 32 in the manifest, the pretrained model has 16"):
        PretrainedParts(other)
    weights = next(file for file in manifest.pretrained.files if file.name == "model.safetensors")
    asset_store().path(weights.asset).unlink()
    with pytest.raises(DataError, match=r"model\.safetensors of the run's pretrained model is not on this machine"):
        PretrainedParts(manifest)


def test_the_tokenizer_of_the_folder_is_the_runs(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "pretrained")
    exported(tmp_path / "model", kept_manifest(folder), (folder / "tokenizer.json").read_bytes())
    library = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert library.token_to_id(END) == N_TOKENS - 1

"""What the folder's own code computes around a pretrained model, beside what a swarm's trunk computes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from node.model.generation import Generation, Prompt
from node.model.next_token import GenerationConfig
from node.model.pretrained_files import language_model
from tests.support.exported import exported, read_by_transformers
from tests.support.tiny_pretrained import KINDS, N_TOKENS, kept_manifest, save_chat_model

if TYPE_CHECKING:
    from pathlib import Path

    from node.model.trunk import Trunk

CLOSE: Any = {"atol": 1e-5, "rtol": 1e-5}
ROUNDED: Any = {"atol": 0.05, "rtol": 0.05}
"""What bfloat16 may make of it."""

CODES: dict[str, Any] = {"gate_reads": "tokens", "gate_heads": 2, "experts_per_token": 4}
RECIPES: dict[str, dict[str, Any]] = {
    "hidden states": {},
    "product keys": {"gate": "product_key", "expert_kind": "ffn"},
    "codes": CODES,
    "hash, and a norm that is trained": {"gate": "hash", **CODES, "gate_shortest": 1, "unfreeze": ("model.norm",)},
    "a whole part is trained": {"unfreeze": ("model.layers.3.mlp", "model.layers.0.self_attn.q")},
    "the layers at both ends": {"attach": (0, 3)},
}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILOHIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def written(folder: Path, model: dict[str, Any] | None = None, **run: Any) -> tuple[Trunk, Any]:
    """A run's trunk, and what transformers reads of its export; `model` is what is special in the pretrained model."""
    language_model.cache_clear()
    manifest = kept_manifest(save_chat_model(folder / "pretrained", **(model or {})), **run)
    trunk, _ = exported(folder / "model", manifest, max_bytes=20_000)  # several files
    return trunk, read_by_transformers(folder / "model")


def some_ids(n_rows: int = 3, n_tokens: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, N_TOKENS, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["hidden states", "codes"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trunk, Any]:
    return written(tmp_path_factory.mktemp("exported"), **RECIPES[request.param])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@torch.no_grad()
def test_logits_are_those_of_the_swarms_model(tmp_path: Path, kind: str, recipe: dict[str, Any]) -> None:
    trunk, model = written(tmp_path, {"kind": kind}, **recipe)
    ids = some_ids()
    logits_BTV = model(ids).logits
    torch.testing.assert_close(logits_BTV, trunk(ids), **CLOSE)
    without_experts = model.language_model(ids) if model.codes is None else None
    assert without_experts is None or torch.equal(without_experts.logits, logits_BTV)  # they are in it


@torch.no_grad()
def test_what_is_not_trained_is_the_pretrained_model(tmp_path: Path) -> None:
    _, model = written(tmp_path, unfreeze=("model.norm",))
    manifest = kept_manifest(tmp_path / "pretrained", unfreeze=("model.norm",))
    expected = language_model(manifest.pretrained).state_dict()
    found = model.language_model.state_dict()
    assert {name for name, t in expected.items() if not torch.equal(found[name], t)} == {"model.norm.weight"}


@torch.no_grad()
def test_each_weight_keeps_its_type_also_when_the_model_is_saved_again(tmp_path: Path) -> None:
    trunk, model = written(tmp_path, {"dtype": torch.bfloat16}, dtype="bf16")
    ids = some_ids()
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    for read in (model, read_by_transformers(tmp_path / "again")):
        types = {name: p.dtype for name, p in read.named_parameters()}
        assert {t for name, t in types.items() if name.startswith("language_model.")} == {torch.bfloat16}
        assert {t for name, t in types.items() if name.startswith("moe_layers.")} == {torch.float32}
        torch.testing.assert_close(read(ids).logits.float(), trunk(ids), **ROUNDED)
        assert torch.equal(read(ids).logits, model(ids).logits)


@torch.no_grad()
def test_in_half_precision_the_same_experts_are_chosen(tmp_path: Path) -> None:
    written(tmp_path, unfreeze=("model.norm",))
    half = read_by_transformers(tmp_path / "model", torch.bfloat16)
    assert half.language_model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for p in half.moe_layers.parameters()} == {torch.float32}


@pytest.mark.parametrize("unfreeze", [(), ("model.embed_tokens",)])
@torch.no_grad()
def test_weights_with_two_names_are_written_once_unless_one_of_them_is_trained(
    tmp_path: Path, unfreeze: tuple[str, ...]
) -> None:
    trunk, model = written(tmp_path, {"tie_word_embeddings": True}, unfreeze=unfreeze)
    ids = some_ids()
    torch.testing.assert_close(model(ids).logits, trunk(ids), **CLOSE)
    inner = model.language_model
    assert (inner.lm_head.weight is inner.model.embed_tokens.weight) == (not unfreeze)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(read_by_transformers(tmp_path / "again")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_rows_logits_are_those_that_it_has_alone_wherever_it_is_padded(both: tuple[Trunk, Any], side: str) -> None:
    trunk, model = both
    rows = [some_ids(1, n, seed=n)[0] for n in (3, 16, 9)]
    ids = pad_sequence(rows, batch_first=True, padding_value=7, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    logits = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index][mask[index] == 1], trunk(row[None])[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_read_in_pieces_has_the_logits_of_the_whole(both: tuple[Trunk, Any]) -> None:
    trunk, model = both
    ids = some_ids(2)
    whole = trunk(ids)
    cache = DynamicCache(config=model.config.get_text_config())
    for start, stop in ((0, 7), (7, 8), (8, 16)):
        part = model(ids[:, start:stop], cache=cache, logits_to_keep=1)
        torch.testing.assert_close(part.logits[:, 0], whole[:, stop - 1], **CLOSE)
    cache.crop(-8)
    cache.reorder_cache(torch.LongTensor([1, 0]))
    again = model(ids.flip(0)[:, 8:], cache=cache).logits
    torch.testing.assert_close(again, whole.flip(0)[:, 8:], **CLOSE)


def greedy(trunk: Trunk, prompt: torch.Tensor, n_tokens: int) -> list[int]:
    config = GenerationConfig(max_new_tokens=n_tokens, temperature=0)
    return [new.token for step in Generation(trunk, [Prompt(ids=prompt.tolist(), config=config)]) for new in step]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_writes_what_the_swarms_model_writes_for_prompts_of_several_lengths(
    both: tuple[Trunk, Any], use_cache: bool
) -> None:
    trunk, model = both
    prompts = [some_ids(1, n, seed=n)[0] for n in (2, 8)]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "use_cache": use_cache}
    written = model.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **settings)
    for prompt, of_row in zip(prompts, written[:, 8:].tolist(), strict=True):
        assert of_row == greedy(trunk, prompt, 8)


def test_generate_draws_searches_with_beams_and_ends_where_the_model_ends(both: tuple[Trunk, Any]) -> None:
    _, model = both
    prompt = some_ids(2, 4)
    torch.manual_seed(0)
    rows = model.generate(prompt[:1].repeat(8, 1), do_sample=True, max_new_tokens=4, eos_token_id=None)
    assert len({tuple(row) for row in rows.tolist()}) > 1
    cached, read_again = (
        model.generate(prompt, do_sample=False, num_beams=3, max_new_tokens=5, eos_token_id=None, use_cache=cached)
        for cached in (True, False)
    )
    assert cached.tolist() == read_again.tolist()
    assert model.generation_config.eos_token_id == N_TOKENS - 1
    first = int(model.generate(prompt[:1], do_sample=False, max_new_tokens=1)[0, -1])
    assert model.generate(prompt[:1], do_sample=False, max_new_tokens=5, eos_token_id=first).shape == (1, 5)


def test_it_has_a_loss_and_gradients(both: tuple[Trunk, Any]) -> None:
    _, model = both
    ids = some_ids(2)
    model(ids, labels=ids).loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    assert all(moe.gate.expert_keys_ED.grad is not None for moe in model.moe_layers)
    model.zero_grad()


@torch.no_grad()
def test_a_copy_has_experts_of_its_own(both: tuple[Trunk, Any]) -> None:
    _, model = both
    ids = some_ids(1)
    before = model(ids).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(ids).logits, before)
    for parameter in other.moe_layers.parameters():
        parameter.zero_()
    assert not torch.equal(other(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_experts_that_are_chosen_by_tokens_refuse_what_has_none(tmp_path: Path) -> None:
    _, model = written(tmp_path, **CODES)
    ids = some_ids(1)
    with pytest.raises(ValueError, match="input_ids: are missing; the experts of this model are chosen by them"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="the experts are chosen by tokens: call the whole model"):
        model.language_model(ids)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), must be \(1, 16\)"):
        model(ids, attention_mask=torch.ones(1, 3))


def test_its_embeddings_are_those_of_the_pretrained_model(both: tuple[Trunk, Any]) -> None:
    _, model = both
    assert model.get_input_embeddings() is model.language_model.model.embed_tokens
    assert model.get_output_embeddings() is model.language_model.lm_head

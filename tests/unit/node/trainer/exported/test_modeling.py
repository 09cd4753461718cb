"""What the folder's own code computes, beside what a swarm's model computes: logits, padding, the cache, refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from node.model.generation import Generation, Prompt
from node.model.next_token import GenerationConfig
from tests.support.exported import HASH, exported, read_by_transformers
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from node.model.trunk import Trunk

CLOSE: Any = {"atol": 1e-5, "rtol": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "hash of two heads": {**HASH, "gate_heads": 2, "experts_per_token": 4},
    "hash of one token, few experts": {**HASH, "gate_shortest": 1, "experts_per_layer": 3, "experts_per_token": 3},
    "topk by hidden states": {"gate": "topk"},
    "topk of heads by codes": {"gate": "topk", "gate_reads": "tokens", "gate_heads": 2, "gate_score": "softmax"},
    "product keys by hidden states": {"gate": "product_key", "gate_heads": 2, "experts_per_token": 4},
    "product keys by codes": {"gate": "product_key", "gate_reads": "tokens", "gate_score": "softmax", "smear": 3},
    "balanced in proportion": {"gate": "topk", "balance": "proportional"},
    "adapters, a block cut short": {"expert_kind": "lora", "experts_per_layer": 10, "experts_per_block": 4},
    "one expert": {"experts_per_layer": 1, "experts_per_block": 1, "experts_per_token": 1},
}


def some_ids(n_rows: int = 3, n_tokens: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trunk, Any]:
    folder = tmp_path_factory.mktemp("exported") / "model"
    model, _ = exported(folder, max_bytes=20_000)  # several files
    return model, read_by_transformers(folder)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_logits_are_those_of_the_swarms_model(tmp_path: Path, shape: dict[str, Any], dtype: Any) -> None:
    model, _ = exported(tmp_path / "model", small_manifest(model=shape, dtype=dtype))
    ids = some_ids()
    torch.testing.assert_close(read_by_transformers(tmp_path / "model")(ids).logits, model(ids), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "within"])
@torch.no_grad()
def test_a_rows_logits_are_those_that_it_has_alone_wherever_it_is_padded_and_with_whatever_id(
    both: tuple[Trunk, Any], side: str
) -> None:
    _, model = both
    rows = [some_ids(1, n, seed=n)[0] for n in (3, 16, 9)]
    ids, mask = torch.full((3, 16), 255), torch.zeros(3, 16, dtype=torch.int64)
    for row, (of_row, of_mask) in zip(rows, zip(ids, mask, strict=True), strict=True):
        n, gap = len(row), 16 - len(row)
        places = {"left": range(gap, 16), "right": range(n), "within": [0, *range(1 + gap, 16)]}[side]
        of_row[list(places)] = row
        of_mask[list(places)] = 1
    logits = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index][mask[index] == 1], model(row[None]).logits[0], **CLOSE)


@torch.no_grad()
def test_what_is_read_in_pieces_has_the_logits_of_the_whole(both: tuple[Trunk, Any]) -> None:
    _, model = both
    ids = some_ids(2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    whole = model(ids, attention_mask=mask).logits
    cache = DynamicCache(config=model.config)
    for start, stop in ((0, 7), (7, 8), (8, 16)):
        part = model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache, logits_to_keep=1)
        torch.testing.assert_close(part.logits[:, 0], whole[:, stop - 1], **CLOSE)
    cache.crop(-8)
    cache.reorder_cache(torch.LongTensor([1, 0]))
    again = model(ids.flip(0)[:, 8:], cache=cache).logits  # the mask of what was read is in the cache
    torch.testing.assert_close(again, whole.flip(0)[:, 8:], **CLOSE)


def greedy(model: Trunk, prompt: torch.Tensor, n_tokens: int) -> list[int]:
    config = GenerationConfig(max_new_tokens=n_tokens, temperature=0)
    return [new.token for step in Generation(model, [Prompt(ids=prompt.tolist(), config=config)]) for new in step]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_writes_what_the_swarms_model_writes_for_prompts_of_several_lengths(
    both: tuple[Trunk, Any], use_cache: bool
) -> None:
    ours, model = both
    prompts = [some_ids(1, n, seed=n)[0] for n in (2, 8)]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    written = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6, use_cache=use_cache)
    for prompt, of_row in zip(prompts, written[:, 8:].tolist(), strict=True):
        assert of_row == greedy(ours, prompt, 6)


def test_generate_draws_and_searches_with_beams(both: tuple[Trunk, Any]) -> None:
    _, model = both
    prompt = some_ids(2, 4)
    torch.manual_seed(0)
    drawn = {tuple(row) for row in model.generate(prompt[:1].repeat(8, 1), max_new_tokens=4)[:, 4:].tolist()}
    assert len(drawn) > 1
    cached, read_again = (
        model.generate(prompt, do_sample=False, num_beams=3, max_new_tokens=5, use_cache=cached)
        for cached in (True, False)
    )
    assert cached.tolist() == read_again.tolist()


def test_the_loss_is_the_mean_of_what_is_not_left_out(both: tuple[Trunk, Any]) -> None:
    _, model = both
    ids = some_ids(2)
    labels = ids.clone()
    labels[0, :8] = -100
    result = model(ids, labels=labels)
    losses = torch.nn.functional.cross_entropy(result.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(result.loss, losses[labels[:, 1:] != -100].mean())
    result.loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_more_than_the_context_and_masks_of_another_shape_are_refused_in_one_sentence(
    both: tuple[Trunk, Any],
) -> None:
    _, model = both
    with pytest.raises(ValueError, match="17 tokens are more than the 16 of this model's context"):
        model(some_ids(1, 17))
    with pytest.raises(ValueError, match="17 tokens are more than the 16 of this model's context"):
        model.generate(some_ids(1, 10), max_new_tokens=8)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), must be \(1, 4\)"):
        model(some_ids(1, 4), attention_mask=torch.ones(1, 3))


@torch.no_grad()
def test_in_half_precision_the_same_experts_are_chosen(tmp_path: Path) -> None:
    exported(tmp_path / "model", small_manifest(model={"gate": "topk"}))
    half = read_by_transformers(tmp_path / "model", torch.bfloat16)
    assert half.embedding_VD.dtype == torch.bfloat16
    gate = half.layers[0].moe.gate
    assert {gate.bias_E.dtype, gate.expert_keys_ED.dtype} == {torch.float32}
    assert bool(torch.isfinite(half(some_ids()).logits).all())

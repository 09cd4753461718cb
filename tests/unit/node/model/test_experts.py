"""The stacked, grouped, sparse arithmetic of a block against the plain thing: one expert, one token, one torch Adam."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import pytest
import torch
from torch.nn import functional

from common.errors import CheckpointError, InvalidInputError, NotHostedError
from node.model.experts import adam as adam_module
from node.model.experts import tiles as tiles_module
from node.model.experts.adam import AdamState, adam_step
from node.model.experts.block import new_block
from node.model.experts.layer import LayerGradients, check_hosted, layer_backward, layer_forward
from node.model.experts.state import (
    MAX_STEPS,
    block_from_state,
    block_metadata,
    block_state,
    block_tensors,
    restore_block,
)
from node.model.experts.tiles import Chosen
from node.model.pairs import Pairs
from protocol.manifest import BlockId, ExpertKindName
from tests.support.swarm_parts import CPU, small_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.model.experts.block import Block, BlockGradients
    from node.model.replica_state import ReplicaState
    from protocol.manifest import Manifest


def layer_blocks(manifest: Manifest, layer: int = 0) -> list[Block]:
    return [new_block(manifest, BlockId(layer, b), CPU) for b in range(manifest.model.blocks_per_layer)]


def random_pairs(n_tokens: int, n_experts: int, per_token: int, dtype: torch.dtype) -> Pairs:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(n_tokens, n_experts, generator=generator)
    return Pairs(
        token_P=torch.arange(n_tokens).repeat_interleave(per_token),
        expert_P=scores.topk(per_token).indices.reshape(-1),
        weight_P=torch.rand(n_tokens * per_token, generator=generator, dtype=dtype),
    )


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"ffn": functional.gelu, "lora": lambda h: h}


def plain_layer(kind: str, weights: dict[str, torch.Tensor], x_TD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    rows = [torch.zeros_like(x_TD[0]) for _ in x_TD]
    for token, expert, weight in zip(*pairs, strict=True):
        h_H = ACTIVATIONS[kind](x_TD[token] @ weights["w_in"][expert])
        rows[token] = rows[token] + weight * (h_H @ weights["w_out"][expert])
    return torch.stack(rows)


def one_each(expert_P: torch.Tensor, weight_P: torch.Tensor) -> Pairs:
    """Each token goes to one expert."""
    return Pairs(torch.arange(len(expert_P)), expert_P, weight_P)


def unweighted(block: Block, x_PD: torch.Tensor, expert_P: torch.Tensor, grad_PD: torch.Tensor) -> BlockGradients:
    return weighted(block, x_PD, one_each(expert_P, torch.ones(len(x_PD), dtype=x_PD.dtype)), grad_PD)[1]


def weighted(
    block: Block, x_PD: torch.Tensor, pairs: Pairs, grad_PD: torch.Tensor
) -> tuple[LayerGradients, BlockGradients]:
    """`pairs` name experts as the block counts them."""
    found: list[BlockGradients] = []
    pairs = pairs._replace(expert_P=pairs.expert_P + block.experts.start)
    got = layer_backward([block], x_PD, pairs, grad_PD, lambda _, gradients: found.append(gradients))
    return got, found[0]


def outputs(block: Block, x_PD: torch.Tensor, expert_P: torch.Tensor) -> torch.Tensor:
    return layer_forward([block], x_PD, one_each(expert_P, torch.ones(len(x_PD), dtype=x_PD.dtype)))


def stacked(blocks: list[Block]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([b.params[name] for b in blocks]).clone().requires_grad_() for name in blocks[0].params}


@pytest.mark.parametrize("kind", get_args(ExpertKindName))
@pytest.mark.parametrize("model", [{}, {"experts_per_layer": 64, "experts_per_block": 32}])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-12), ("fp32", 2e-5)])
def test_a_layer_computes_and_differentiates_like_a_loop_over_experts(
    dtype: str, tolerance: float, model: dict[str, int], kind: str
) -> None:
    manifest = small_manifest(dtype=dtype, model={**model, "expert_kind": kind})
    blocks = layer_blocks(manifest)
    for block in blocks:
        block.params["w_out"].normal_(std=0.3, generator=torch.Generator().manual_seed(block.id.block))
    weights = stacked(blocks)
    real = torch.float64 if dtype == "fp64" else torch.float32
    x_TD = torch.randn(12, 16, dtype=real, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grad_TD = torch.randn(12, 16, dtype=real, generator=torch.Generator().manual_seed(2))
    pairs = random_pairs(12, manifest.model.experts_per_layer, 2, real)
    weight_P = pairs.weight_P.clone().requires_grad_()
    wanted = plain_layer(kind, weights, x_TD, pairs._replace(weight_P=weight_P))
    names = list(weights)
    grads = torch.autograd.grad(wanted, (x_TD, weight_P, *weights.values()), grad_TD)

    torch.testing.assert_close(layer_forward(blocks, x_TD.detach(), pairs), wanted.detach(), rtol=0, atol=tolerance)
    per_block: list[tuple[Block, BlockGradients]] = []
    got = layer_backward(blocks, x_TD.detach(), pairs, grad_TD, lambda *found: per_block.append(found))
    torch.testing.assert_close(got.tokens_TD, grads[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(got.weight_P, grads[1], rtol=0, atol=tolerance)
    assert per_block
    for block, gradients in per_block:
        for name in names:
            wanted_G = grads[2 + names.index(name)][block.experts.start : block.experts.stop][gradients.touched_G]
            torch.testing.assert_close(gradients.weights[name], wanted_G, rtol=0, atol=tolerance)


def test_a_layer_that_is_computed_a_few_pairs_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = layer_blocks(small_manifest(dtype="fp64"))
    generator = torch.Generator().manual_seed(1)
    x_TD, grad_TD = torch.randn(2, 40, 16, dtype=torch.float64, generator=generator)
    pairs = random_pairs(40, sum(len(block.experts) for block in blocks), 2, torch.float64)

    def results() -> list[torch.Tensor]:
        per_block: list[BlockGradients] = []
        got = layer_backward(blocks, x_TD, pairs, grad_TD, lambda _, gradients: per_block.append(gradients))
        assert len(per_block) == len(blocks), "each block is stepped once"
        sums = [of for g in per_block for of in (*g.weights.values(), g.touched_G, g.tokens_G)]
        return [layer_forward(blocks, x_TD, pairs), got.tokens_TD, got.weight_P, *sums]

    at_once = results()
    monkeypatch.setattr(tiles_module, "CACHE_VALUES", 1)
    tiles = Chosen.of(pairs.expert_P.sort().values).tiles(1, 16, CPU)
    assert [tile.shape[0] for tile in tiles] == [1] * 16, "experts are cut apart"
    for ours, wanted in zip(results(), at_once, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def test_touched_experts_step_like_torchs_adam_and_the_others_stay_bit_equal() -> None:
    manifest = small_manifest(dtype="fp64", optimizer={"weight_decay": 0.1, "expert_grad_clip": 1e9})
    block = new_block(manifest, BlockId(0, 0), CPU)
    before = copy.deepcopy(block.params)
    touched = [[0, 2], [2, 3], [0, 2]]
    per_expert = {
        expert: {name: p[expert].clone().requires_grad_() for name, p in before.items()} for expert in range(4)
    }
    adam = {
        expert: torch.optim.AdamW(list(params.values()), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for expert, params in per_expert.items()
    }
    for step, experts in enumerate(touched):
        generator = torch.Generator().manual_seed(step)
        x_PD = torch.randn(len(experts) * 3, 16, dtype=torch.float64, generator=generator)
        grad_PD = torch.randn(len(experts) * 3, 16, dtype=torch.float64, generator=generator)
        expert_P = torch.tensor(experts).repeat_interleave(3)
        block.step(unweighted(block, x_PD, expert_P, grad_PD), 1e-3, manifest.optimizer)
        for index, expert in enumerate(experts):
            rows = slice(3 * index, 3 * index + 3)
            params = per_expert[expert]
            y = functional.gelu(x_PD[rows] @ params["w_in"]) @ params["w_out"]
            for p, g in zip(params.values(), torch.autograd.grad(y, list(params.values()), grad_PD[rows]), strict=True):
                p.grad = g
            adam[expert].step()
    for expert, params in per_expert.items():
        for name, p in params.items():
            torch.testing.assert_close(block.params[name][expert], p.detach(), rtol=0, atol=1e-12)
    assert torch.equal(block.params["w_in"][1], before["w_in"][1])
    assert block.adam.steps_E.tolist() == [2, 0, 3, 1]
    assert block.version == 3


@pytest.mark.parametrize("beta2", [0.0, 0.95])
def test_experts_that_are_stepped_in_ranges_step_as_one_by_one(beta2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_module, "SMALL_VALUES", 1)
    config = replace(small_manifest().optimizer, beta2=beta2, beta1=min(0.9, beta2))
    generator = torch.Generator().manual_seed(0)
    steps_E = torch.tensor([0, 0, 3, 3, 3, 5000, 9000, 40, 40, 1])
    touched_G = torch.tensor([0, 1, 3, 4, 5, 6, 8])
    params, first, second, grads = (
        {"w": torch.randn(n, 8, 3, dtype=torch.float64, generator=generator)} for n in (10, 10, 10, 7)
    )
    second["w"].square_()
    wanted = params["w"].clone()
    for index, expert in enumerate(touched_G.tolist()):
        weight = wanted[expert].clone().requires_grad_()
        adam = torch.optim.AdamW([weight], lr=1e-2, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0)
        adam.state[weight] = {
            "step": steps_E[expert].double(),
            "exp_avg": first["w"][expert].clone(),
            "exp_avg_sq": second["w"][expert].clone(),
        }
        weight.grad = grads["w"][index]
        adam.step()
        wanted[expert] = weight.detach()
    state = AdamState(first=first, second=second, steps_E=steps_E)
    adam_step(params, state, grads, touched_G, 1e-2, config)
    # Corrections that a float32 does not tell from 1 are left out.
    torch.testing.assert_close(params["w"], wanted, rtol=0, atol=1e-7)
    assert state.steps_E.tolist() == [1, 1, 3, 4, 4, 5001, 9001, 40, 41, 1]


def test_an_experts_gradient_is_clipped_by_its_own_norm() -> None:
    manifest = small_manifest(dtype="fp64", optimizer={"expert_grad_clip": 0.5})
    block = new_block(manifest, BlockId(0, 0), CPU)
    grad_PD = torch.full((4, 16), 1e3, dtype=torch.float64)
    gradients = unweighted(block, torch.randn(4, 16, dtype=torch.float64), torch.tensor([0, 0, 1, 1]), grad_PD)
    block.step(gradients, 1e-3, manifest.optimizer)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.weights.values()]).norm(dim=0)
    torch.testing.assert_close(norms, torch.full((2,), 0.5, dtype=torch.float64))


def test_an_expert_with_a_gradient_that_is_not_finite_is_left_alone_and_counted() -> None:
    manifest = small_manifest()
    block = new_block(manifest, BlockId(0, 0), CPU)
    before = copy.deepcopy(block.params)
    gradients = unweighted(block, torch.randn(2, 16), torch.tensor([0, 1]), torch.randn(2, 16))
    gradients.weights["w_in"][0, 0, 0] = float("nan")
    block.step(gradients, 1e-3, manifest.optimizer)
    assert torch.equal(block.params["w_in"][0], before["w_in"][0])
    assert not torch.equal(block.params["w_in"][1], before["w_in"][1])
    assert block.skipped_steps == 1
    assert bool(torch.isfinite(block.params["w_in"]).all())


COUNTS = [*[1] * 9, *[2] * 6, 3, 7, 8, 40, 41, 200]


@pytest.mark.parametrize("cache_values", [1, 2**10, 2**18])
def test_tiles_hold_every_pair_once_and_pad_experts_with_their_own(
    cache_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles_module, "CACHE_VALUES", cache_values)
    experts = torch.randperm(50, generator=torch.Generator().manual_seed(1))[: len(COUNTS)].sort().values
    expert_P = experts.repeat_interleave(torch.tensor(COUNTS)[torch.randperm(len(COUNTS))])
    real: list[int] = []
    for tile in Chosen.of(expert_P).tiles(256, 16, CPU):
        n_experts, rows = tile.shape
        pair_GR = tile.pair_X.view(n_experts, rows)
        assert (expert_P[pair_GR] == tile.experts_G[:, None]).all()
        assert n_experts == 1 or n_experts * max(256, 16 * rows) <= cache_values
        real += pair_GR[tile.is_real_GR].tolist()
    assert sorted(real) == list(range(sum(COUNTS)))


def test_tiles_pad_by_a_fourth_or_by_what_another_tile_would_cost() -> None:
    expert_P = torch.arange(400).repeat_interleave(torch.arange(400) + 1)
    tiles = Chosen.of(expert_P).tiles(tiles_module.FREE_VALUES, 1, CPU)
    for tile in tiles:
        assert (tile.is_real_GR.sum(1) >= tile.shape[1] - max(1, tile.shape[1] // 4)).all()
    alike = Chosen.of(torch.arange(64).repeat_interleave(3)).tiles(tiles_module.CACHE_VALUES // 64, 16, CPU)
    assert [tile.shape for tile in alike] == [(64, 3)]


def test_an_expert_that_overflows_spoils_no_token_but_its_own() -> None:
    block = new_block(small_manifest(), BlockId(0, 0), CPU)
    block.params["w_out"][1] = torch.finfo(torch.float32).max
    x_PD, expert_P = torch.randn(6, 16), torch.tensor([0, 0, 0, 1, 2, 2])
    y_PD = outputs(block, 4 * x_PD.abs(), expert_P)
    assert not torch.isfinite(y_PD[3]).all()
    assert torch.isfinite(y_PD[expert_P != 1]).all()


def test_a_block_starts_the_same_on_every_peer_and_differs_from_its_neighbours() -> None:
    manifest = small_manifest()
    one, same, other = (new_block(manifest, BlockId(0, b), CPU) for b in (0, 0, 1))
    assert torch.equal(one.params["w_in"], same.params["w_in"])
    assert not torch.equal(one.params["w_in"], other.params["w_in"])


def test_adapters_change_nothing_until_they_learn_and_then_learn_both_matrices() -> None:
    manifest = small_manifest(model={"expert_kind": "lora", "expert_hidden": 2})
    block = new_block(manifest, BlockId(0, 0), CPU)
    x_PD, expert_P = torch.randn(8, 16), torch.arange(4).repeat_interleave(2)
    assert block.params["w_in"].shape == (4, 16, 2)
    assert bool((outputs(block, x_PD, expert_P) == 0).all())
    start = copy.deepcopy(block.params)
    for _ in range(2):
        block.step(unweighted(block, x_PD, expert_P, torch.randn(8, 16)), 1e-3, manifest.optimizer)
    assert all(bool((block.params[name] != start[name]).any()) for name in start)
    assert bool((outputs(block, x_PD, expert_P) != 0).any())


def test_the_gradients_of_an_adapter_are_what_small_differences_say() -> None:
    manifest = small_manifest(dtype="fp64", model={"expert_kind": "lora", "expert_hidden": 3})
    block = new_block(manifest, BlockId(0, 0), CPU)
    block.params["w_out"].normal_(generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    x_PD, grad_PD = torch.randn(2, 5, 16, dtype=torch.float64, generator=generator)
    weight_P, expert_P = torch.rand(5, dtype=torch.float64, generator=generator), torch.tensor([0, 0, 1, 1, 1])
    got, gradients = weighted(block, x_PD, one_each(expert_P, weight_P), grad_PD)
    weights = gradients.weights

    def total() -> float:
        return float((weight_P[:, None] * grad_PD * outputs(block, x_PD, expert_P)).sum())

    step = 1e-6
    for of, gradient in ((x_PD, got.tokens_TD), *((block.params[n], g) for n, g in weights.items())):
        for index in (0, 7, 31):
            before = float(of.view(-1)[index])
            of.view(-1)[index] = before + step
            above = total()
            of.view(-1)[index] = before - step
            slope = (above - total()) / (2 * step)
            of.view(-1)[index] = before
            assert float(gradient.reshape(-1)[index]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_an_expert_that_is_not_hosted_is_named() -> None:
    blocks = [new_block(small_manifest(), BlockId(0, b), CPU) for b in (0, 2)]
    check_hosted(blocks, torch.tensor([0, 3, 8, 11]), layer=0)
    with pytest.raises(NotHostedError, match="expert 5 of layer 0 is not hosted here"):
        check_hosted(blocks, torch.tensor([0, 5, 8]), layer=0)


def trained_block(manifest: Manifest) -> Block:
    block = new_block(manifest, BlockId(0, 1), CPU)
    block.step(
        unweighted(block, torch.randn(2, 16), torch.tensor([0, 1]), torch.randn(2, 16)),
        1e-3,
        manifest.optimizer,
    )
    return block


def test_a_restored_block_is_bit_equal() -> None:
    manifest = small_manifest()
    block = trained_block(manifest)
    back = restore_block(manifest, block.id, block_tensors(block), block_metadata(block, manifest.run_id), CPU)
    assert back.version == 1
    for name, tensor in block_tensors(block).items():
        assert torch.equal(block_tensors(back)[name], tensor)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda t, m: m.update(run_id="other"), "its run_id is 'other'"),
        (lambda t, m: m.update(block="0/2"), "its block is '0/2'"),
        (lambda t, m: m.update(version="-1"), "its version"),
        (lambda t, m: m.update(version="9" * 5000), "its version is '9{40}', must be a number"),
        (lambda t, m: t.pop("steps_E"), "must have"),
        (lambda t, m: t.update({"params.w_in": t["params.w_in"][:2]}), "params.w_in: is"),
        (lambda t, m: t.update(learnt=t["steps_E"]), "'learnt' belongs to no block"),
        (lambda t, m: t.pop("second.w_out"), "tensors: are .* must be"),
        (lambda t, m: t["params.w_in"].fill_(float("nan")), "params.w_in: holds NaN"),
    ],
)
def test_a_block_state_that_does_not_fit_is_refused(spoil: object, problem: str) -> None:
    manifest = small_manifest()
    block = trained_block(manifest)
    tensors, metadata = block_tensors(block), block_metadata(block, manifest.run_id)
    spoil(tensors, metadata)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=problem):
        restore_block(manifest, block.id, tensors, metadata, CPU)


def test_a_block_counts_the_tokens_that_each_expert_has_learnt_from() -> None:
    manifest = small_manifest()
    block = new_block(manifest, BlockId(0, 0), CPU)
    for _ in range(2):
        expert_P = torch.tensor([0, 0, 0, 2])
        block.step(unweighted(block, torch.randn(4, 16), expert_P, torch.randn(4, 16)), 1e-3, manifest.optimizer)
    assert block.learnt_E.tolist() == [6, 0, 2, 0]


def test_an_expert_that_was_not_stepped_has_learnt_nothing() -> None:
    manifest = small_manifest()
    block = new_block(manifest, BlockId(0, 0), CPU)
    gradients = unweighted(block, torch.randn(2, 16), torch.tensor([0, 1]), torch.randn(2, 16))
    gradients.weights["w_in"][0, 0, 0] = float("nan")
    block.step(gradients, 1e-3, manifest.optimizer)
    assert block.learnt_E.tolist() == [0, 1, 0, 0]


BAD_STATES: dict[str, tuple[Callable[[ReplicaState], object], str]] = {
    "a tensor too few": (lambda s: s.first.pop("w_in"), "tensors: are"),
    "a tensor too many": (lambda s: s.params.update(w_mid=s.params["w_in"]), "tensors: are"),
    "another shape": (lambda s: s.params.update(w_in=s.params["w_in"][:2]), "params.w_in: is"),
    "another type": (lambda s: s.first.update(w_in=s.first["w_in"].double()), "first.w_in: is"),
    "an infinity": (lambda s: s.params["w_out"].view(-1)[3].fill_(float("inf")), "params.w_out: holds NaN or infinity"),
    "a moment whose root Adam could not take": (
        lambda s: s.second["w_in"].view(-1)[0].fill_(-1e-9),
        "second.w_in: holds a negative number",
    ),
    "steps of too few rows": (lambda s: setattr(s, "steps_R", s.steps_R[:2]), "steps: is"),
    "steps below none": (lambda s: s.steps_R[1].fill_(-1), "steps: holds -1"),
    "steps that would overflow": (lambda s: s.steps_R[1].fill_(2**63 - 1), f"steps: is .* the limit is {MAX_STEPS}"),
    "a version that would overflow": (lambda s: setattr(s, "version", 2**64 - 1), "version: is .* the limit is"),
    "a version below none": (lambda s: setattr(s, "version", -1), "version: is -1"),
}


@pytest.mark.parametrize("name", list(BAD_STATES))
def test_a_joiner_takes_no_state_that_does_not_fit_the_run(name: str) -> None:
    spoil, problem = BAD_STATES[name]
    manifest = small_manifest()
    state = block_state(trained_block(manifest)).copy()
    spoil(state)
    with pytest.raises(InvalidInputError, match=problem):
        block_from_state(manifest, BlockId(0, 1), state, CPU)

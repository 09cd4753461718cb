"""The stacked, grouped, sparse arithmetic of a block against the plain thing: one expert, one token, one torch Adam."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, get_args

import pytest
import torch
from torch.nn import functional

from common.errors import CheckpointError, InvalidInputError, NotHostedError
from node.model.experts import layer as layer_module
from node.model.experts.block import new_block
from node.model.experts.grouped import MAX_ROWS, MIN_RUN, Groups, grouped_outer, grouped_product, order_by_size
from node.model.experts.layer import check_hosted, layer_backward, layer_forward
from node.model.experts.state import (
    MAX_STEPS,
    block_from_state,
    block_metadata,
    block_state,
    block_tensors,
    restore_block,
)
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


def unweighted(block: Block, x_PD: torch.Tensor, expert_P: torch.Tensor, grad_PD: torch.Tensor) -> BlockGradients:
    return block.backward(x_PD, expert_P, grad_PD, torch.ones(len(x_PD), dtype=x_PD.dtype)).gradients


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
    monkeypatch.setattr(layer_module, "VALUES_AT_ONCE", 16 * 3)
    sizes = {len(part.expert_P) for part in layer_module._slices(blocks, pairs.expert_P.sort().values, 16)}
    assert max(sizes) < len(pairs.expert_P) / len(blocks), "blocks are cut"
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


def test_an_experts_gradient_is_clipped_by_its_own_norm() -> None:
    manifest = small_manifest(dtype="fp64", optimizer={"expert_grad_clip": 0.5})
    block = new_block(manifest, BlockId(0, 0), CPU)
    gradients = block.backward(
        torch.randn(4, 16, dtype=torch.float64),
        torch.tensor([0, 0, 1, 1]),
        torch.full((4, 16), 1e3, dtype=torch.float64),
        torch.ones(4, dtype=torch.float64),
    ).gradients
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


def test_groups_of_equal_size_stand_side_by_side_where_there_are_enough_of_them() -> None:
    few = [2] * (MIN_RUN - 1)
    counts_G = torch.tensor([1, MAX_ROWS + 1, *few, 1, 3, *[1] * MIN_RUN, *[3] * MIN_RUN, *[MAX_ROWS + 1] * MIN_RUN])
    ordered = order_by_size(counts_G, int(counts_G.sum()))
    assert ordered is not None
    order_G, groups = ordered
    assert groups.runs == ((1, MIN_RUN + 2), (3, MIN_RUN + 1))
    assert groups.counts_G.tolist() == [1] * (MIN_RUN + 2) + [3] * (MIN_RUN + 1) + [9, *few, *[9] * MIN_RUN]
    assert sorted(order_G.tolist()) == list(range(len(counts_G)))
    assert torch.equal(counts_G[order_G], groups.counts_G)
    assert order_by_size(torch.tensor([1, 2, 3, 9, 9, 9, 9]), 42) is None


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("counts", [[1] * 5, [2] * 6 + [1] * 4 + [9, 3], [3] * 4 + [20]])
def test_groups_in_runs_give_what_a_loop_gives(width: int, counts: list[int]) -> None:
    ordered = order_by_size(torch.tensor(counts), sum(counts))
    assert ordered is not None
    groups = ordered[1]
    x_PN, y_PM = torch.randn(sum(counts), 8), torch.randn(sum(counts), width)
    w_GNM, sizes = torch.randn(len(counts), 8, width), groups.counts_G.tolist()
    wanted = torch.cat([rows @ w for rows, w in zip(x_PN.split(sizes), w_GNM, strict=True)])
    torch.testing.assert_close(grouped_product(x_PN, w_GNM, groups), wanted)
    outer = [rows.T @ others for rows, others in zip(x_PN.split(sizes), y_PM.split(sizes), strict=True)]
    torch.testing.assert_close(grouped_outer(x_PN, y_PM, groups), torch.stack(outer))


@pytest.mark.parametrize("hidden", [1, 3, 8])
def test_the_grouped_product_equals_a_loop_for_aligned_and_other_widths(hidden: int) -> None:
    x_PN, w_GNM = torch.randn(10, 8), torch.randn(4, 8, hidden)
    wanted = torch.cat([x_PN[:3] @ w_GNM[0], x_PN[3:7] @ w_GNM[2], x_PN[7:] @ w_GNM[3]])
    groups = Groups.of(torch.tensor([3, 0, 4, 3]))
    torch.testing.assert_close(grouped_product(x_PN, w_GNM, groups), wanted)
    back = torch.cat([wanted[:3] @ w_GNM[0].T, wanted[3:7] @ w_GNM[2].T, wanted[7:] @ w_GNM[3].T])
    torch.testing.assert_close(grouped_product(wanted, w_GNM.mT, groups), back)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_grouped_outer_product_equals_a_loop_and_is_zero_for_a_group_without_rows(width: int) -> None:
    x_PN, y_PM = torch.randn(10, width), torch.randn(10, 8)
    got_GNM = grouped_outer(x_PN, y_PM, Groups.of(torch.tensor([3, 0, 4, 3])))
    wanted = [x_PN[:3].T @ y_PM[:3], torch.zeros(width, 8), x_PN[3:7].T @ y_PM[3:7], x_PN[7:].T @ y_PM[7:]]
    torch.testing.assert_close(got_GNM, torch.stack(wanted))


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
    assert bool((block.forward(x_PD, expert_P) == 0).all())
    start = copy.deepcopy(block.params)
    for _ in range(2):
        block.step(unweighted(block, x_PD, expert_P, torch.randn(8, 16)), 1e-3, manifest.optimizer)
    assert all(bool((block.params[name] != start[name]).any()) for name in start)
    assert bool((block.forward(x_PD, expert_P) != 0).any())


def test_the_gradients_of_an_adapter_are_what_small_differences_say() -> None:
    manifest = small_manifest(dtype="fp64", model={"expert_kind": "lora", "expert_hidden": 3})
    block = new_block(manifest, BlockId(0, 0), CPU)
    block.params["w_out"].normal_(generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    x_PD, grad_PD = torch.randn(2, 5, 16, dtype=torch.float64, generator=generator)
    weight_P, expert_P = torch.rand(5, dtype=torch.float64, generator=generator), torch.tensor([0, 0, 1, 1, 1])
    gradients = block.backward(x_PD, expert_P, grad_PD, weight_P)
    weights = gradients.gradients.weights

    def total() -> float:
        return float((weight_P[:, None] * grad_PD * block.forward(x_PD, expert_P)).sum())

    step = 1e-6
    for of, gradient in ((x_PD, gradients.inputs_PD), *((block.params[n], g) for n, g in weights.items())):
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

"""The gate chooses live experts only, weighs them to one, balances them and holds capacity; forward changes nothing."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidInputError, ManifestError
from node.model.gate import Gate, GateStats, build_gate, product_key
from node.model.gate.base import allot, normalised_weights, within_capacity
from protocol.manifest import GateKind, Manifest, ModelConfig

if TYPE_CHECKING:
    from node.model.gate import GateOutput

KINDS: tuple[GateKind, ...] = tuple(kind for kind in get_args(GateKind) if kind != "hash")
"""Those that choose by scores of their input; what a hash does is in `test_hash_gate.py`."""

each_kind = pytest.mark.parametrize("kind", KINDS)


def make_gate(kind: GateKind, *, experts: int = 64, k: int = 4, capacity_factor: float = 0.0, seed: int = 0) -> Gate:
    return gate_of(model_of(kind, experts=experts, k=k, capacity_factor=capacity_factor), seed)


def model_of(kind: GateKind, *, experts: int = 64, k: int = 4, capacity_factor: float = 0.0) -> ModelConfig:
    return ModelConfig(
        d_model=16,
        experts_per_layer=experts,
        experts_per_token=k,
        gate=kind,
        capacity_factor=capacity_factor,
        balance_rate=1e-3,
    )


def gate_of(model: ModelConfig, seed: int = 0) -> Gate:
    return build_gate(model, torch.Generator().manual_seed(seed))


def softmax_gate(kind: GateKind, *, experts: int = 64, k: int = 4) -> Gate:
    return gate_of(replace(model_of(kind, experts=experts, k=k), gate_score="softmax", balance="proportional"))


def tokens(n: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


def choose(gate: Gate, x_TD: torch.Tensor, live_E: torch.Tensor | None = None) -> GateOutput:
    output: GateOutput = gate(x_TD, live_E)
    return output


def all_logits(gate: Gate, x_TD: torch.Tensor) -> torch.Tensor:
    """The logit of every expert, written as the papers do rather than as the gate computes it."""
    weights = dict(gate.named_parameters())
    if "expert_keys_ED" in weights:
        return x_TD.mm(weights["expert_keys_ED"].T)
    first, second = (
        half / half.pow(2).mean(1, keepdim=True).sqrt() @ keys.T
        for half, keys in zip((x_TD @ weights["query_weight"].T).split(8, 1), weights["sub_keys_2SC"], strict=True)
    )
    logits: torch.Tensor = first[:, :, None] + second[:, None, :]
    return logits.flatten(1)


def assert_valid(output: GateOutput, live_E: torch.Tensor, k: int) -> None:
    ids, weights = output.expert_ids_TK, output.weights_TK
    chosen = ids >= 0
    assert (chosen.sum(1) == min(k, int(live_E.sum()))).all()
    assert live_E[ids[chosen]].all()
    assert (weights[~chosen] == 0).all()
    assert (weights[chosen] > 0).all()
    torch.testing.assert_close(weights.sum(1), chosen.any(1).to(weights.dtype))
    for row in ids:
        real = row[row >= 0].tolist()
        assert len(real) == len(set(real))


@each_kind
def test_takes_the_k_highest_scores_and_weighs_by_them(kind: GateKind) -> None:
    gate, x = make_gate(kind).double(), tokens().double()
    output = choose(gate, x)
    best = all_logits(gate, x).sigmoid().topk(4)
    assert (output.expert_ids_TK.sort(1).values == best.indices.sort(1).values).all()
    by_id = output.weights_TK.gather(1, output.expert_ids_TK.argsort(1))
    expected = (best.values / best.values.sum(1, keepdim=True)).gather(1, best.indices.argsort(1))
    torch.testing.assert_close(by_id, expected, rtol=1e-9, atol=1e-9)


@each_kind
def test_load_counts_the_pairs_of_each_expert(kind: GateKind) -> None:
    output = choose(make_gate(kind), tokens())
    assert output.load_E.tolist() == torch.bincount(output.expert_ids_TK.flatten(), minlength=64).tolist()
    assert output.overflow == 0


@each_kind
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 63), max_size=64, unique=True), st.sampled_from([torch.float32, torch.float64]))
def test_only_live_experts_are_chosen_and_as_many_as_there_are(
    kind: GateKind, live: list[int], dtype: torch.dtype
) -> None:
    live_E = torch.zeros(64, dtype=torch.bool)
    live_E[live] = True
    gate = make_gate(kind).to(dtype)
    assert_valid(choose(gate, tokens().to(dtype), live_E), live_E, k=4)


def test_product_keys_find_experts_that_no_pair_of_best_sub_keys_reaches() -> None:
    gate = make_gate("product_key", experts=1024, k=2)
    live_E = torch.zeros(1024, dtype=torch.bool)
    live_E[torch.arange(32) * 33] = True  # the diagonal: each row and each column has one live expert
    output = choose(gate, tokens(300), live_E)
    assert_valid(output, live_E, k=2)


@each_kind
def test_no_live_expert_gives_zeros_and_no_nan_even_in_the_gradient(kind: GateKind) -> None:
    gate, x = make_gate(kind, capacity_factor=1.0), tokens().requires_grad_()
    output = choose(gate, x, torch.zeros(64, dtype=torch.bool))
    assert (output.expert_ids_TK == -1).all()
    assert (output.weights_TK == 0).all()
    output.weights_TK.sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_weights_stay_finite_where_every_sigmoid_underflows() -> None:
    logits = torch.tensor([[-200.0, -201.0, 5.0], [-1e6, -1e6, 0.0]], requires_grad=True)
    chosen = torch.tensor([[True, True, False], [True, True, False]])
    weights = normalised_weights(logits, chosen)
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    torch.testing.assert_close(weights[0], torch.tensor([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1)), 0.0]))
    torch.testing.assert_close(weights[1], torch.tensor([0.5, 0.5, 0.0]))
    assert gradient.isfinite().all()


@each_kind
def test_no_tokens_is_a_valid_batch(kind: GateKind) -> None:
    output = choose(make_gate(kind, capacity_factor=1.0), tokens(0))
    assert output.expert_ids_TK.shape == output.weights_TK.shape == (0, 4)
    assert output.load_E.sum() == 0


@each_kind
def test_weights_pass_gradcheck_for_tokens_and_every_parameter(kind: GateKind) -> None:
    gate, x = make_gate(kind, experts=16, k=3).double().eval(), tokens(5).double().requires_grad_()
    parameters = dict(gate.named_parameters())

    def weights(x_TD: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(parameters, values, strict=True))
        output: GateOutput = torch.func.functional_call(gate, named, (x_TD, None))
        # By expert, not by rank: a step of the check may swap two nearly equal scores.
        return torch.zeros(5, 16, dtype=torch.float64).scatter(1, output.expert_ids_TK, output.weights_TK)

    assert torch.autograd.gradcheck(weights, (x, *parameters.values()))


@each_kind
def test_with_softmax_the_k_highest_logits_are_chosen_and_weighed_by_their_softmax(kind: GateKind) -> None:
    gate, x = softmax_gate(kind).double(), tokens().double() * 8
    gate.bias_E.copy_(torch.rand(64, generator=torch.Generator().manual_seed(2)) * 0.01)
    output, logits_TE = choose(gate, x), all_logits(gate, x)
    best = (logits_TE + gate.bias_E).topk(4).indices
    assert (output.expert_ids_TK.sort(1).values == best.sort(1).values).all()
    expected = torch.softmax(logits_TE.gather(1, output.expert_ids_TK), 1)
    torch.testing.assert_close(output.weights_TK, expected, rtol=1e-9, atol=1e-9)


def gate_of_heads(kind: GateKind, n_heads: int, *, experts: int = 64, k: int = 4) -> Gate:
    model = replace(model_of(kind, experts=experts, k=k), gate_score="softmax", gate_heads=n_heads)
    return gate_of(model).double()


@each_kind
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 63), max_size=64, unique=True), st.sampled_from([2, 4]))
def test_heads_choose_other_live_experts_each_and_as_many_as_there_are(
    kind: GateKind, live: list[int], n_heads: int
) -> None:
    live_E = torch.zeros(64, dtype=torch.bool)
    live_E[live] = True
    assert_valid(choose(gate_of_heads(kind, n_heads), tokens().double(), live_E), live_E, k=4)


@each_kind
def test_each_head_reads_its_own_input_and_all_are_weighed_together(kind: GateKind) -> None:
    gate, x_TQD = gate_of_heads(kind, 2), torch.randn(50, 2, 16, dtype=torch.float64)
    output = choose(gate, x_TQD)
    torch.testing.assert_close(output.weights_TK.sum(1), torch.ones(50, dtype=torch.float64))
    first, second = x_TQD.clone(), x_TQD.clone()
    first[:, 0], second[:, 1] = torch.randn(2, 50, 16, dtype=torch.float64)
    ids = output.expert_ids_TK
    assert torch.equal(choose(gate, second).expert_ids_TK[:, :2], ids[:, :2])
    assert not torch.equal(choose(gate, second).expert_ids_TK[:, 2:], ids[:, 2:])
    assert not torch.equal(choose(gate, first).expert_ids_TK[:, :2], ids[:, :2])
    alike = choose(gate, x_TQD[:, :1].expand(50, 2, 16))
    assert torch.equal(alike.expert_ids_TK, choose(gate, x_TQD[:, 0]).expert_ids_TK)


def test_heads_must_share_a_tokens_experts_evenly() -> None:
    with pytest.raises(ManifestError, match=r"model\.gate_heads: must divide experts_per_token = 4, is 3"):
        Manifest(name="a", model=replace(model_of("topk"), gate_heads=3))


@each_kind
def test_softmax_weights_pass_gradcheck(kind: GateKind) -> None:
    gate, x = softmax_gate(kind, experts=16, k=3).double().eval(), tokens(5).double().requires_grad_()

    def weights(x_TD: torch.Tensor) -> torch.Tensor:
        output = choose(gate, x_TD)
        return torch.zeros(5, 16, dtype=torch.float64).scatter(1, output.expert_ids_TK, output.weights_TK)

    assert torch.autograd.gradcheck(weights, x)


def test_with_softmax_a_bias_reaches_experts_whose_row_no_token_has_in_its_shortlist() -> None:
    gate, x = softmax_gate("product_key", experts=1024, k=2), tokens(200)
    with torch.no_grad():
        dict(gate.named_parameters())["sub_keys_2SC"][0, 7] = 0  # a row in the middle of every token's scores
    row = slice(7 * 32, 8 * 32)
    before = choose(gate, x).load_E[row].sum()
    gate.bias_E[row] = 20.0
    assert before < 200
    assert choose(gate, x).load_E[row].sum() == 400


def test_proportional_balance_moves_by_the_part_that_the_mean_load_lacks() -> None:
    gate = gate_of(replace(model_of("topk", experts=4, k=1), balance="proportional"))
    gate.update_balance(torch.tensor([10, 0, 5, 5]))  # means 10, 0, 5, 5: lacks -1, 1, 0, 0
    torch.testing.assert_close(gate.bias_E, torch.tensor([-1e-3, 1e-3, 0.0, 0.0]))
    gate.update_balance(torch.tensor([0, 0, 5, 5]))  # means 9, 0, 5, 5 of 4.75 in the mean
    lacks = torch.tensor([1 - 9 / 4.75, 1.0, 1 - 5 / 4.75, 1 - 5 / 4.75])
    wanted = torch.tensor([-1e-3, 1e-3, 0.0, 0.0]) + 1e-3 * (lacks - lacks.mean())
    torch.testing.assert_close(gate.bias_E, wanted)
    still = gate.bias_E.clone()
    gate.mean_load_E.fill_(3.0)
    gate.update_balance(torch.tensor([3, 3, 3, 3]))
    torch.testing.assert_close(gate.bias_E, still)


def test_proportional_balance_counts_live_experts_only_and_stays_exact_in_half_precision() -> None:
    gate = gate_of(replace(model_of("topk", experts=4, k=1), balance="proportional")).half()
    assert gate.bias_E.dtype == gate.mean_load_E.dtype == torch.float32
    live_E = torch.tensor([True, True, False, False])
    gate.update_balance(torch.zeros(4, dtype=torch.int64), live_E)
    assert bool(gate.bias_E.isfinite().all())
    gate.update_balance(torch.tensor([8, 0, 0, 0]), live_E)
    torch.testing.assert_close(gate.bias_E, torch.tensor([-1e-3, 1e-3, 0.0, 0.0]))


@each_kind
def test_proportional_balancing_evens_out_a_skewed_load(kind: GateKind) -> None:
    assert_balancing_evens_out_a_skewed_load(softmax_gate(kind), rate=0.05)


def assert_balancing_evens_out_a_skewed_load(gate: Gate, rate: float) -> None:
    common = torch.randn(16, generator=torch.Generator().manual_seed(9)) * 2
    x = tokens(512) * 0.5 + common  # all tokens alike: without balancing a few experts take everything

    def spread() -> float:
        load = choose(gate, x).load_E.double()
        return float(load.std() / load.mean())

    before = spread()
    gate.balance_rate = rate
    for _ in range(300):
        gate.update_balance(choose(gate, x).load_E)
    assert spread() < 0.6 * before


@each_kind
def test_the_bias_changes_which_experts_are_chosen_but_not_how_they_weigh(kind: GateKind) -> None:
    gate, x = make_gate(kind).double(), tokens().double()
    plain = choose(gate, x)
    gate.bias_E += 0.25
    moved = choose(gate, x)
    torch.testing.assert_close(moved.weights_TK, plain.weights_TK, rtol=0, atol=0)
    favourite = int(plain.load_E.argmax())
    gate.bias_E[favourite] -= 10
    assert choose(gate, x).load_E[favourite] == 0


def test_balance_moves_bias_against_the_load_by_the_rate_leaving_the_mean() -> None:
    gate = make_gate("topk", experts=4, k=1)
    gate.update_balance(torch.tensor([10, 0, 5, 5]))
    torch.testing.assert_close(gate.bias_E, torch.tensor([-1e-3, 1e-3, 0.0, 0.0]))
    gate.update_balance(torch.tensor([10, 0, 0, 0]))
    torch.testing.assert_close(gate.bias_E.diff(), torch.tensor([4e-3, -1e-3, 0.0]))
    assert gate.bias_E.mean().abs() < 1e-9


def test_balance_counts_live_experts_only() -> None:
    gate, live_E = make_gate("topk", experts=4, k=1), torch.tensor([True, True, False, False])
    gate.update_balance(torch.tensor([8, 2, 0, 0]), live_E)
    torch.testing.assert_close(gate.bias_E, torch.tensor([-1e-3, 1e-3, 0.0, 0.0]))
    gate.update_balance(torch.tensor([0, 0, 0, 0]), torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(gate.bias_E, torch.tensor([-1e-3, 1e-3, 0.0, 0.0]))


@each_kind
def test_balancing_evens_out_a_skewed_load(kind: GateKind) -> None:
    assert_balancing_evens_out_a_skewed_load(make_gate(kind), rate=0.01)


@each_kind
def test_capacity_keeps_each_experts_heaviest_pairs_and_renormalises_the_rest(kind: GateKind) -> None:
    gate, x = make_gate(kind, experts=16, k=3, capacity_factor=1.0), tokens(64)
    free, limited = choose(gate.eval(), x), choose(gate.train(), x)
    capacity = 64 * 3 // 16
    assert free.overflow == 0
    assert limited.load_E.tolist() == free.load_E.tolist()
    kept_load = torch.bincount(limited.expert_ids_TK[limited.expert_ids_TK >= 0], minlength=16)
    assert kept_load.tolist() == free.load_E.clamp(max=capacity).tolist()
    assert limited.overflow == int((free.load_E - kept_load).sum()) > 0
    n_cut = 0
    for expert in range(16):
        mine = free.expert_ids_TK == expert
        kept = mine & (limited.expert_ids_TK == expert)
        if (mine & ~kept).any():
            n_cut += 1
            assert free.weights_TK[kept].min() >= free.weights_TK[mine & ~kept].max()
    assert n_cut == int((free.load_E > capacity).sum()) > 0
    any_left = (limited.expert_ids_TK >= 0).any(1)
    torch.testing.assert_close(limited.weights_TK.sum(1), any_left.float())


def test_capacity_is_a_share_of_the_live_experts() -> None:
    gate, live_E = make_gate("topk", experts=16, k=2, capacity_factor=1.0), torch.arange(16) < 4
    output = choose(gate, tokens(40), live_E)
    kept = output.expert_ids_TK[output.expert_ids_TK >= 0]
    assert torch.bincount(kept, minlength=16).max() == 40 * 2 // 4


def test_equal_weights_over_capacity_keep_the_earlier_tokens() -> None:
    kept = within_capacity(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), capacity=2)
    assert kept.flatten().tolist() == [True, True, False, False, False]


def test_a_token_that_loses_every_expert_weighs_nothing() -> None:
    ids, logits = torch.tensor([[0, 1], [0, 1], [0, -1]]), torch.tensor([[3.0, 1.0], [1.0, 3.0], [9.0, 9.0]])
    output = allot(ids, logits, n_experts=2, capacity=1)
    assert output.expert_ids_TK.tolist() == [[-1, -1], [-1, 1], [0, -1]]
    assert output.weights_TK.tolist() == [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert output.overflow == 3


@each_kind
def test_the_same_generator_gives_the_same_gate_in_both_precisions(kind: GateKind) -> None:
    first, second, other = make_gate(kind, seed=3), make_gate(kind, seed=3), make_gate(kind, seed=4)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    single, double = choose(first, tokens()), choose(second.double(), tokens().double())
    assert torch.equal(single.expert_ids_TK, double.expert_ids_TK)


@each_kind
def test_threads_share_a_gate_and_forward_changes_no_state(kind: GateKind) -> None:
    gate = make_gate(kind, capacity_factor=1.0)
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    batches = [tokens(200, seed) for seed in range(16)]
    alone = [choose(gate, batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda batch: choose(gate, batch), batches))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.expert_ids_TK, other.expert_ids_TK)
        assert torch.equal(one.weights_TK, other.weights_TK)
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())
    assert gate.stats() == GateStats()


def test_a_few_tokens_candidates_at_a_time_are_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, live_E = make_gate("product_key", experts=1024, k=4), torch.arange(1024) % 3 > 0
    whole = choose(gate, tokens(50), live_E)
    monkeypatch.setattr(product_key, "PAIRS_AT_ONCE", 3 * (2 * 4) ** 2)
    assert torch.equal(choose(gate, tokens(50), live_E).expert_ids_TK, whole.expert_ids_TK)


def test_product_keys_never_form_a_score_per_token_and_expert() -> None:
    def largest_input(kind: GateKind) -> int:
        gate, x = make_gate(kind, experts=4096, k=4), tokens(64)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            choose(gate, x)
        shapes = [shape for event in profile.events() for shape in event.input_shapes]
        return max(int(math.prod(shape)) for shape in shapes if shape)

    assert largest_input("topk") == 64 * 4096
    assert largest_input("product_key") <= 64 * 64 + 64 * (2 * 4) ** 2  # the sub-scores; the candidates


def test_bad_input_names_the_field_and_what_fits() -> None:
    gate = make_gate("topk")
    with pytest.raises(InvalidInputError, match=r"x_TD.*\(3, 17\).*\(tokens, 16\)"):
        gate(torch.zeros(3, 17))
    with pytest.raises(InvalidInputError, match=r"live_E.*float32"):
        gate(torch.zeros(3, 16), torch.ones(64))
    with pytest.raises(InvalidInputError, match=r"live_E.*\(63,\)"):
        gate(torch.zeros(3, 16), torch.ones(63, dtype=torch.bool))


def test_a_grid_that_the_gate_cannot_serve_is_refused() -> None:
    with pytest.raises(ManifestError, match="square"):
        make_gate("product_key", experts=512)
    with pytest.raises(ManifestError, match="experts_per_token"):
        make_gate("topk", experts=2, k=3)
    with pytest.raises(ManifestError, match="must be one of topk, product_key"):
        make_gate("router")  # type: ignore[arg-type]


@each_kind
def test_biases_stay_precise_in_a_model_of_half_precision(kind: GateKind) -> None:
    gate = make_gate(kind).to(torch.bfloat16)
    assert gate.dtype == torch.bfloat16
    gate.bias_E += 0.3
    before = gate.bias_E.clone()
    gate.update_balance(torch.arange(gate.n_experts))
    assert gate.bias_E.dtype == torch.float32
    assert bool((gate.bias_E != before).any()), "a move of a thousandth is lost in bfloat16"
    assert choose(gate, tokens().bfloat16()).weights_TK.dtype == torch.float32
    assert gate.double().bias_E.dtype == torch.float64

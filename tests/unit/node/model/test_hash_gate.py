"""Experts by a hash of codes: the same for the same context, wherever for others, and others where some are gone."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidInputError, ManifestError
from node.model.gate import Gate, GateOutput, HashGate, build_gate
from node.model.gate.hashed import mixed, sign_bits
from node.model.token_codes import TokenCodes
from protocol.manifest import Manifest, ModelConfig

MODEL = ModelConfig(
    d_model=64, experts_per_layer=60, experts_per_token=4, gate="hash", gate_reads="tokens", gate_heads=4
)


def gate_of(model: ModelConfig = MODEL, seed: int = 0) -> HashGate:
    gate = build_gate(model, torch.Generator().manual_seed(seed))
    assert isinstance(gate, HashGate)
    return gate


def codes_of(ids_BT: torch.Tensor, model: ModelConfig = MODEL) -> torch.Tensor:
    codes_NQD: torch.Tensor = TokenCodes(model, torch.Generator().manual_seed(5))(ids_BT)
    return codes_NQD


def some_codes(n: int = 500) -> torch.Tensor:
    return codes_of(torch.randint(256, (1, n), generator=torch.Generator().manual_seed(1)))


def choose(gate: Gate, codes_NQD: torch.Tensor, live_E: torch.Tensor | None = None) -> GateOutput:
    output: GateOutput = gate(codes_NQD, live_E)
    return output


def test_a_context_has_the_same_experts_wherever_it_stands_and_all_weigh_alike() -> None:
    output = choose(gate_of(), codes_of(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 9]])))
    assert torch.equal(output.expert_ids_TK[5], output.expert_ids_TK[12]), "the last five bytes are alike"
    assert (output.expert_ids_TK[6] != output.expert_ids_TK[13]).sum() >= 3
    assert bool((output.weights_TK == 0.25).all())
    assert output.chosen().mean_effective_k == 4.0


def test_each_head_goes_by_one_byte_more() -> None:
    before, after = (
        choose(gate_of(), codes_of(torch.tensor([ids]))).expert_ids_TK
        for ids in ([1, 2, 3, 4, 5, 6, 7, 8], [1, 9, 3, 4, 5, 6, 7, 8])
    )
    assert torch.equal(before[6:], after[6:]), "the longest context has five bytes"
    # A head may have another expert after a head before it has taken its first wish, so that only the first is certain.
    assert (before[:, 0] != after[:, 0]).nonzero().flatten().tolist() == [1, 2]


def test_a_seed_gives_the_same_choice_and_the_next_layer_another() -> None:
    codes_NQD, generator = some_codes(), torch.Generator().manual_seed(0)
    first, second = (build_gate(MODEL, generator) for _ in range(2))
    ids = [choose(gate, codes_NQD).expert_ids_TK for gate in (gate_of(), first, second)]
    assert torch.equal(ids[0], ids[1])
    assert float((ids[1] == ids[2]).float().mean()) == pytest.approx(1 / 60, abs=0.02)


def test_contexts_spread_as_evenly_as_chance_has_it() -> None:
    load_E = choose(gate_of(replace(MODEL, experts_per_layer=61)), some_codes(4000)).load_E.double()
    poisson = math.sqrt(61 / (4000 * 4))
    assert float(load_E.std() / load_E.mean()) < 1.5 * poisson


def test_where_an_expert_is_gone_only_the_choices_of_those_that_had_it_change() -> None:
    codes_NQD, live_E = some_codes(), torch.ones(60, dtype=torch.bool)
    before = choose(gate_of(), codes_NQD).expert_ids_TK
    live_E[7] = False
    after = choose(gate_of(), codes_NQD, live_E).expert_ids_TK
    had_it_T = (before == 7).any(1)
    assert 0 < int(had_it_T.sum()) < 100
    assert torch.equal(before[~had_it_T], after[~had_it_T])
    assert bool(((after >= 0) & (after != 7)).all())


@settings(deadline=None, max_examples=60)
@given(
    live=st.sets(st.integers(0, 59)), n_heads=st.sampled_from((1, 2, 4)), n_experts=st.sampled_from((60, 61)),
)  # fmt: skip
def test_chosen_are_other_live_experts_each_and_as_many_as_there_are(
    live: set[int], n_heads: int, n_experts: int
) -> None:
    gate = gate_of(replace(MODEL, gate_heads=n_heads, experts_per_layer=n_experts))
    live_E = torch.zeros(n_experts, dtype=torch.bool)
    live_E[list(live)] = True
    output = choose(gate, some_codes(40)[:, :n_heads], live_E)
    for ids in output.expert_ids_TK.tolist():
        chosen = [number for number in ids if number >= 0]
        assert set(chosen) <= live
        assert len(chosen) == len(set(chosen)) == min(4, len(live))


def test_capacity_drops_what_is_over_it_and_the_rest_is_weighed_anew() -> None:
    gate = gate_of(replace(MODEL, capacity_factor=1.0))
    output = choose(gate, some_codes())
    kept_TK = output.expert_ids_TK >= 0
    assert output.overflow == int((~kept_TK).sum()) > 0
    assert int(output.expert_ids_TK[kept_TK].bincount().max()) <= math.ceil(500 * 4 / 60)
    has_any_T = kept_TK.any(1)
    torch.testing.assert_close(output.weights_TK.sum(1)[has_any_T], torch.ones(int(has_any_T.sum())))


def test_threads_share_a_gate_and_no_tokens_are_a_batch_too() -> None:
    gate, codes_NQD = gate_of(), some_codes()
    expected = choose(gate, codes_NQD).expert_ids_TK
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: choose(gate, codes_NQD).expert_ids_TK, range(16)))
    assert all(torch.equal(ids, expected) for ids in found)
    assert choose(gate, codes_NQD[:0]).expert_ids_TK.shape == (0, 4)


def test_every_stride_reaches_every_expert() -> None:
    for n_experts in (4, 60, 61, 2025):
        strides = gate_of(replace(MODEL, experts_per_layer=n_experts)).strides_X.tolist()
        assert all(math.gcd(stride, n_experts) == 1 for stride in strides)
        assert len(strides) == len(set(strides)) > 1


def test_an_input_that_is_no_code_of_each_head_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidInputError, match=r"second argument, or take a gate that learns, such as topk"):
        gate_of()(torch.randn(10, 64))
    with pytest.raises(ManifestError, match=r"model\.gate_reads: must be tokens where gate is hash, is 'hidden'"):
        Manifest(name="a", model=replace(MODEL, gate_reads="hidden"))


def test_nothing_is_learnt_and_the_load_moves_nothing() -> None:
    gate = gate_of()
    assert list(gate.parameters()) == []
    gate.update_balance(torch.arange(60))
    assert not gate.bias_E.any()
    assert set(gate.state_dict()) == set(gate_of(seed=1).state_dict()) == {"bias_E"}


def test_signs_are_told_apart_and_mixed_over_all_bits() -> None:
    rows_TD = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])
    assert sign_bits(rows_TD).tolist() == [0b101, 0b011]
    changed_T = mixed(torch.arange(1000)) ^ mixed(torch.arange(1000) ^ 1)
    flipped = sum((value & (2**64 - 1)).bit_count() for value in changed_T.tolist()) / 1000
    assert flipped == pytest.approx(32, abs=1), "one bit of the input changes half of those of the hash"

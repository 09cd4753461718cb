"""What is measured about a gate's choices: the load of its experts, how many count, and how many a token keeps."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, get_args

import pytest
import torch

from common.errors import InvalidInputError
from node.model.gate import ChoiceProbe, ChoiceSummary, Gate, GateStats, LoadWindow, build_gate
from node.model.gate.probe import kept_fraction
from node.model.gate.stats import effective_experts
from protocol.manifest import GateKind, ModelConfig

if TYPE_CHECKING:
    from node.model.gate import GateOutput

each_kind = pytest.mark.parametrize("kind", [kind for kind in get_args(GateKind) if kind != "hash"])


def make_gate(kind: GateKind) -> Gate:
    model = ModelConfig(
        d_model=16, experts_per_layer=64, experts_per_token=4, gate=kind, capacity_factor=0.0, balance_rate=1e-3
    )
    return build_gate(model, torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(1))


def choose(gate: Gate, x_TD: torch.Tensor) -> GateOutput:
    output: GateOutput = gate(x_TD)
    return output


def test_an_even_load_has_full_entropy_and_no_spread() -> None:
    window = LoadWindow(8)
    window.observe(ChoiceSummary(load_E=torch.full((8,), 5)))
    stats = window.stats()
    assert (stats.n_live, stats.dead_fraction, stats.load_cv, stats.load_max_over_mean) == (8, 0.0, 0.0, 1.0)
    assert stats.load_entropy_bits == pytest.approx(3.0)


def test_one_expert_taking_all_has_no_entropy_and_the_rest_are_dead() -> None:
    window = LoadWindow(8)
    window.observe(ChoiceSummary(load_E=torch.tensor([80, 0, 0, 0, 0, 0, 0, 0]), overflow=20))
    stats = window.stats()
    assert stats.dead_fraction == pytest.approx(7 / 8)
    assert stats.load_max_over_mean == pytest.approx(8.0)
    assert stats.load_cv == pytest.approx(math.sqrt(7))
    assert stats.load_entropy_bits == pytest.approx(0.0)
    assert stats.overflow_fraction == pytest.approx(0.25)


def test_an_expert_is_dead_once_it_sat_out_the_whole_window_and_alive_when_chosen_again() -> None:
    window = LoadWindow(2, window_steps=3)
    both, first_only = torch.tensor([1, 1]), torch.tensor([2, 0])
    dead = []
    for load in (both, first_only, first_only, first_only, both):
        window.observe(ChoiceSummary(load_E=load))
        dead.append(window.stats().dead_fraction)
    assert dead == [0.0, 0.0, 0.0, 0.5, 0.0]


def test_statistics_are_of_live_experts_and_absence_is_not_idleness() -> None:
    window = LoadWindow(3, window_steps=2)
    absent = torch.tensor([True, True, False])
    for _ in range(4):
        window.observe(ChoiceSummary(load_E=torch.tensor([3, 3, 0])), absent)
    assert (window.stats().n_live, window.stats().load_cv, window.stats().dead_fraction) == (2, 0.0, 0.0)
    window.observe(ChoiceSummary(load_E=torch.tensor([3, 3, 0])))
    assert window.stats().n_live == 3
    assert window.stats().dead_fraction == 0.0  # it came back one step ago


def test_there_are_no_numbers_before_there_is_load() -> None:
    window = LoadWindow(4)
    assert window.stats() == GateStats()
    window.observe(ChoiceSummary(load_E=torch.zeros(4, dtype=torch.int64)), torch.zeros(4, dtype=torch.bool))
    assert window.stats() == GateStats()


def test_the_gate_reports_what_the_trainer_observed() -> None:
    gate = make_gate("topk")
    gate.observe(ChoiceSummary(load_E=torch.full((64,), 2), overflow=32))
    assert gate.stats().overflow_fraction == pytest.approx(0.25)
    assert gate.stats().load_entropy_bits == pytest.approx(6.0)


@each_kind
def test_the_effective_experts_are_those_that_a_tokens_weights_amount_to(kind: GateKind) -> None:
    gate = make_gate(kind)
    output = choose(gate, tokens())
    chosen = output.chosen()
    assert chosen.n_tokens == len(tokens())
    assert chosen.mean_effective_k == pytest.approx(float((1 / output.weights_TK.detach().square().sum(1)).mean()))
    gate.observe(chosen + chosen)
    assert gate.stats().effective_k == pytest.approx(chosen.mean_effective_k)
    assert 1.0 < gate.stats().effective_k <= gate.experts_per_token


def test_tokens_without_experts_do_not_count_as_having_few() -> None:
    weights_TK = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 0.0]])
    summed, n_tokens = effective_experts(weights_TK)
    assert (summed, n_tokens) == (3.0, 2)
    assert ChoiceSummary(load_E=torch.zeros(4)).mean_effective_k == 0.0


def test_what_is_kept_is_counted_by_token_in_any_order_and_without_those_that_had_none() -> None:
    before_NK = torch.tensor([[1, 2], [3, -1], [-1, -1]])
    now_NK = torch.tensor([[2, 5], [3, 7], [1, -1]])
    assert kept_fraction(before_NK, now_NK) == pytest.approx(2 / 3)
    assert kept_fraction(before_NK[2:], now_NK[2:]) == 0.0


def test_a_probe_tells_what_part_of_the_same_tokens_experts_a_gate_keeps() -> None:
    gate = make_gate("product_key")
    probe, ids_BT = ChoiceProbe([gate]), torch.arange(6).view(2, 3)

    def look(ids_BT: torch.Tensor) -> float | None:
        with probe.looking(ids_BT):
            choose(gate, tokens())
        return gate.stats().kept_fraction

    assert look(ids_BT) is None, "nothing to compare with yet"
    assert look(ids_BT) == 1.0
    before = choose(gate, tokens()).expert_ids_TK
    with torch.no_grad():
        next(gate.parameters()).normal_()
    expected = kept_fraction(before, choose(gate, tokens()).expert_ids_TK)
    assert 0.0 < expected < 1.0
    assert look(ids_BT) == pytest.approx(expected)
    assert look(ids_BT + 1) == pytest.approx(expected), "other tokens are compared with nothing"
    assert look(ids_BT + 1) == 1.0


def test_a_probe_sees_only_the_forward_of_its_own_thread_and_forgets_one_that_fails() -> None:
    gate = make_gate("topk")
    probe, ids_BT, x = ChoiceProbe([gate]), torch.zeros(1, 3), tokens()
    with probe.looking(ids_BT):
        choose(gate, x)
    with probe.looking(ids_BT), ThreadPoolExecutor(1) as pool:
        choose(gate, x)
        pool.submit(choose, gate, -x).result()
    assert gate.stats().kept_fraction == 1.0
    with pytest.raises(InvalidInputError), probe.looking(ids_BT):
        choose(gate, torch.zeros(3, 17))
    with probe.looking(ids_BT):
        choose(gate, x)
    assert gate.stats().kept_fraction == 1.0

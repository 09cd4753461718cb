"""Merges of models, held against cases that were worked out by hand and against what must hold for any of them."""

from __future__ import annotations

import pytest
import torch

from common.errors import InvalidInputError
from experiments.arms.arm import Arm, TrainSpec
from experiments.arms.training import build_model
from experiments.merging.merges import average, by_group, groups, task_arithmetic, ties, trimmed

Weights = dict[str, torch.Tensor]
SHAPES = {"embedding_VD": (3, 4), "layers.0.moe.in_weight": (4, 5), "layers.1.moe.in_weight": (4, 5), "head_VD": (3, 4)}


def drawn(seed: int, scale: float = 1.0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def apart(base: Weights, seeds: range, scale: float = 0.1) -> list[Weights]:
    return [{name: base[name] + learnt[name] for name in base} for learnt in (drawn(seed, scale) for seed in seeds)]


def row(*values: float) -> Weights:
    return {"head": torch.tensor(values)}


def assert_alike(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name])


BASE = drawn(0)
FOUR = apart(BASE, range(1, 5))


def test_the_average_of_equals_is_what_they_are() -> None:
    assert_alike(average([BASE] * 3), BASE)
    assert_alike(average([BASE] * 3, [0.2, 5.0, 1.0]), BASE)


def test_an_average_is_weighted_by_shares_that_need_not_add_up_to_one() -> None:
    assert_alike(average([row(0.0, 4.0), row(8.0, 0.0)]), row(4.0, 2.0))
    assert_alike(average([row(0.0, 4.0), row(8.0, 0.0)], [3.0, 1.0]), row(2.0, 3.0))
    assert_alike(average(FOUR, [0.0, 0.0, 7.0, 0.0]), FOUR[2])


def test_an_average_does_not_depend_on_the_order_of_the_participants() -> None:
    assert_alike(average(FOUR, [1.0, 2.0, 3.0, 4.0]), average(FOUR[::-1], [4.0, 3.0, 2.0, 1.0]))


def test_task_arithmetic_adds_what_each_has_learnt() -> None:
    # 1 + 0.5 * ((3 - 1) + (0 - 1)) = 1.5 and 1 + 0.5 * ((1 - 1) + (5 - 1)) = 3
    assert_alike(task_arithmetic(row(1.0, 1.0), [row(3.0, 1.0), row(0.0, 5.0)], 0.5), row(1.5, 3.0))


def test_task_arithmetic_with_a_scale_of_one_over_the_participants_is_the_average() -> None:
    assert_alike(task_arithmetic(BASE, FOUR, 0.25), average(FOUR))


def test_task_arithmetic_with_a_scale_of_nothing_is_the_base_and_of_one_participant_itself() -> None:
    assert_alike(task_arithmetic(BASE, FOUR, 0.0), BASE)
    assert_alike(task_arithmetic(BASE, FOUR[:1], 1.0), FOUR[0])


def test_ties_elects_the_sign_of_the_larger_mass_and_averages_those_that_agree() -> None:
    participants = [row(3.0, 1.0, 0.0), row(-1.0, -5.0, 0.0), row(-1.0, -3.0, 2.0)]
    # 3 against -2: the mean of {3}; -8 against 1: that of {-5, -3}; {2} alone: who learnt nothing does not count
    assert_alike(ties(row(0.0, 0.0, 0.0), participants, 1.0, 1.0), row(3.0, -4.0, 2.0))
    assert_alike(ties(row(10.0, 10.0, 10.0), apart_by(10.0, participants), 1.0, 0.5), row(11.5, 8.0, 11.0))


def apart_by(start: float, learnt: list[Weights]) -> list[Weights]:
    return [{name: tensor + start for name, tensor in one.items()} for one in learnt]


def test_ties_trims_each_participant_to_its_largest_values_before_it_elects() -> None:
    participants = [row(4.0, 1.0, 0.1, -0.2), row(-1.0, -0.5, 3.0, 2.0)]
    # kept: {4, 1} and {3, 2}, so that nothing is left to disagree
    assert_alike(ties(row(0.0, 0.0, 0.0, 0.0), participants, 0.5, 1.0), row(4.0, 1.0, 3.0, 2.0))


def test_trimming_takes_the_whole_model_as_one_row_and_keeps_at_least_one_value() -> None:
    assert trimmed(torch.tensor([1.0, -4.0, 2.0, 3.0]), 0.5).tolist() == [0.0, -4.0, 0.0, 3.0]
    assert trimmed(torch.tensor([1.0, -4.0]), 1e-6).tolist() == [0.0, -4.0]
    large = {"embedding": torch.ones(4), "head": torch.full((4,), 2.0)}
    merged = ties({name: torch.zeros(4) for name in large}, [large], 0.5, 1.0)
    assert merged["embedding"].tolist() == [0.0] * 4
    assert merged["head"].tolist() == [2.0] * 4


def test_ties_where_all_agree_and_nothing_is_trimmed_is_the_average() -> None:
    positive = [{name: BASE[name] + learnt[name].abs() for name in BASE} for learnt in (drawn(1), drawn(2))]
    assert_alike(ties(BASE, positive, 1.0, 1.0), average(positive))


def test_ties_of_one_participant_that_is_not_trimmed_is_that_participant() -> None:
    assert_alike(ties(BASE, FOUR[:1], 1.0, 1.0), FOUR[0])


def test_ties_where_two_are_opposites_leaves_the_base() -> None:
    assert_alike(ties(row(7.0, 7.0), [row(8.5, 5.0), row(5.5, 9.0)], 1.0, 1.0), row(7.0, 7.0))


def test_a_merge_by_group_with_equal_shares_is_task_arithmetic_and_else_takes_each_group_from_whom_it_says() -> None:
    assert groups(BASE) == ["embedding", "layer 0", "layer 1", "head"]
    assert_alike(by_group(BASE, FOUR, {group: [0.3] * 4 for group in groups(BASE)}), task_arithmetic(BASE, FOUR, 0.3))
    first, last = [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]
    merged = by_group(BASE, FOUR, {"embedding": first, "layer 0": last, "layer 1": first, "head": [0.0] * 4})
    wanted = {name: FOUR[3 if name.startswith("layers.0") else 0][name] for name in BASE} | {"head_VD": BASE["head_VD"]}
    assert_alike(merged, wanted)


def test_a_merge_changes_neither_the_base_nor_the_participants() -> None:
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in (BASE, *FOUR)]
    average(FOUR)
    task_arithmetic(BASE, FOUR, 0.5)["head_VD"].zero_()
    ties(BASE, FOUR, 0.2, 1.0)["head_VD"].zero_()
    for one, other in zip((BASE, *FOUR), before, strict=True):
        assert_alike(one, other)


def test_a_models_tensors_fall_into_its_layers_its_embedding_and_its_head() -> None:
    arm = Arm(label="dense", hidden=16)
    spec = TrainSpec(arm=arm, seed=0, tokens=1, lr=1e-3, expert_lr=1e-3, d_model=16, heads=2)
    model = build_model(spec, torch.device("cpu"))
    found = groups(model.trunk.state_dict())
    assert sorted(found) == ["embedding", "head", "layer 0", "layer 1", "layer 2"]


@pytest.mark.parametrize("shares", [[1.0], [0.0, 0.0], [1.0, -0.5], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_shares_that_are_none_are_refused(shares: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="shares"):
        average([row(1.0), row(2.0)], shares)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_a_density_that_is_no_part_is_refused(density: float) -> None:
    with pytest.raises(InvalidInputError, match="density"):
        ties(row(1.0), [row(2.0)], density, 1.0)


def test_models_of_different_shapes_are_not_merged() -> None:
    with pytest.raises(InvalidInputError, match="not models of one shape"):
        average([row(1.0), row(1.0, 2.0)])
    with pytest.raises(InvalidInputError, match="not models of one shape"):
        task_arithmetic({"other": torch.ones(1)}, [row(1.0)], 1.0)
    with pytest.raises(InvalidInputError, match="there is none"):
        average([])

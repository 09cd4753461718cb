"""The rooms of the product: what the check of them finds in a structure, and that ours has nothing of it."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.structure import MAX_ARROWS_OF_NODE, MAX_ROOMS_OF_NODE, Structure, measured


def structure(*arrows: tuple[str, str]) -> Structure:
    return Structure(files=Counter(room for arrow in arrows for room in arrow), arrows=Counter(arrows))


def test_a_house_with_its_walls_has_no_faults() -> None:
    assert (
        structure(("node.host", "node.model"), ("node.trainer", "node.model"), ("node.model", "common")).faults() == []
    )


@pytest.mark.parametrize("arrow", [("node.host", "node.trainer"), ("node.trainer", "node.host")])
def test_host_and_trainer_stay_apart(arrow: tuple[str, str]) -> None:
    assert structure(arrow).faults() == [f"{arrow[0]} imports {arrow[1]}: they stay apart"]


def test_rooms_in_a_circle_are_named() -> None:
    (fault,) = structure(("node.rpc", "node.model"), ("node.model", "node.data"), ("node.data", "node.rpc")).faults()

    assert fault.startswith("rooms import each other in a circle: ")
    assert {"node.rpc", "node.model", "node.data"} == set(fault.partition(": ")[2].split(" -> "))


def test_too_many_rooms_and_arrows_are_counted() -> None:
    rooms = [f"node.room{number:02}" for number in range(MAX_ROOMS_OF_NODE + 1)]
    arrows = [(rooms[index], rooms[other]) for index in range(len(rooms)) for other in range(index)]

    assert structure(*arrows).faults() == [
        f"node/ has {MAX_ROOMS_OF_NODE + 1} rooms, more than {MAX_ROOMS_OF_NODE}",
        f"{len(arrows)} arrows leave the rooms of node/, more than {MAX_ARROWS_OF_NODE}",
    ]


def test_the_product_is_measured_and_has_no_faults() -> None:
    ours = measured()

    assert {"node.host", "node.trainer", "node.model"} <= set(ours.rooms_of_node)
    assert ours.arrows["node.host", "node.model"] > 0
    assert ours.faults() == []

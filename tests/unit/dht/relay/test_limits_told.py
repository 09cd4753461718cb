"""A relay that has reached a limit says so on both sides, with its value and how it is set, and not too often."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import UnavailableError
from dht.relay.quotas import MAX_RESERVATIONS_PER_ADDRESS, RelayLimits, RelayQuotas
from dht.relay.relaying import RelayLimitError, not_reached, refusal
from dht.relay.reservations import granted

if TYPE_CHECKING:
    from collections.abc import Callable

Quotas = RelayQuotas[str]
LIMITS = RelayLimits(max_reservations=2, max_circuits=3, max_circuits_per_caller=2, max_circuits_per_target=2)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def fill_reservations(quotas: Quotas) -> None:
    for peer in ("a", "b", "c"):
        quotas.reserve(peer, "")


def fill_circuits(quotas: Quotas, *pairs: tuple[str, str]) -> None:
    for target in ("a", "b"):
        quotas.reserve(target, "")
    for caller, target in pairs:
        quotas.open(caller, target)


def fill_address(quotas: Quotas) -> None:
    quotas.limits = RelayLimits(max_reservations=99)
    for number in range(MAX_RESERVATIONS_PER_ADDRESS + 1):
        quotas.reserve(str(number), "8.8.8.8")


CASES: dict[str, tuple[Callable[[Quotas], None], str]] = {
    "reservations": (fill_reservations, "its relay_reservations is 2"),
    "circuits": (
        lambda quotas: fill_circuits(quotas, ("x", "a"), ("y", "a"), ("x", "b"), ("z", "b")),
        "its --relay-circuits is 3",
    ),
    "of a caller": (
        lambda quotas: fill_circuits(quotas, ("x", "a"), ("x", "a"), ("x", "b")),
        "its relay_circuits_per_caller is 2",
    ),
    "to a target": (
        lambda quotas: fill_circuits(quotas, ("x", "a"), ("y", "a"), ("z", "a")),
        "its limit of 2 has no setting",
    ),
    "of an address": (fill_address, "its limit of 16 has no setting"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_both_sides_name_the_limit_its_value_and_its_setting(name: str, caplog: pytest.LogCaptureFixture) -> None:
    meet, limit = CASES[name]
    with pytest.raises(RelayLimitError) as caught:
        meet(Quotas(LIMITS, Clock()))
    assert caplog.messages == [f"Relay: a peer is refused: {caught.value}; {limit}"]
    with pytest.raises(UnavailableError) as there:
        granted(refusal(caught.value))
    assert str(there.value) == f"the relay refuses: {caught.value}; {limit}"


def test_a_limit_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    quotas = Quotas(LIMITS, clock)
    for at_s in (0.0, 1.0, 59.0, 60.0, 61.0):
        clock.now_s = at_s
        with pytest.raises(RelayLimitError):
            fill_reservations(quotas)
    assert (len(caplog.messages), quotas.refused) == (2, 5)


def test_other_refusals_name_no_limit() -> None:
    with pytest.raises(UnavailableError, match=r"is not reached through this relay$"):
        granted(refusal(not_reached("x")))

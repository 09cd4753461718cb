"""Whom a relay leads to, without a socket."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from common.errors import OverloadedError, UnavailableError
from dht.relay.quotas import RelayLimits, RelayQuotas
from dht.relay.reservation_table import Reservation, ReservationTable


class Stream(NamedTuple):
    """A stream with a node, of which its number makes another one of two."""

    peer_id: str
    number: int = 0


def reserved(stream: Stream) -> Reservation[str, Stream]:
    return Reservation(stream, ["/ip4/192.0.2.1/udp/4001/quic-v1"] * 9, peer=stream.peer_id)


class Relay:
    """Quotas and the table over them."""

    def __init__(self, limits: RelayLimits | None = None) -> None:
        self.quotas = RelayQuotas[str](limits or RelayLimits(), lambda: 0.0)
        self.table = ReservationTable[str, Reservation[str, Stream]](self.quotas)


def test_a_caller_is_led_to_who_has_reserved_until_it_leaves() -> None:
    relay, held = Relay(), reserved(Stream("hidden"))
    relay.table.take(held)
    found, circuit = relay.table.connect("caller", "hidden")
    assert found is held
    assert len(held.told) == 4
    assert (circuit.source, circuit.target, relay.quotas.n_circuits) == ("caller", "hidden", 1)
    relay.table.drop(held)
    with pytest.raises(UnavailableError, match="'hidden' is not reached through this relay"):
        relay.table.connect("caller", "hidden")
    assert (len(relay.table), relay.quotas.n_reservations) == (0, 0)


def test_who_reserves_again_keeps_its_place_when_its_first_stream_ends() -> None:
    relay, first, second = (
        Relay(RelayLimits(max_reservations=1)),
        reserved(Stream("hidden")),
        reserved(Stream("hidden", 2)),
    )
    relay.table.take(first)
    relay.table.take(second)
    with pytest.raises(OverloadedError, match="1 reservations"):
        relay.table.take(reserved(Stream("other")))
    relay.table.drop(first)
    assert relay.table.connect("caller", "hidden")[0] is second
    relay.table.drop(second)
    relay.table.renew(first)
    assert (len(relay.table), relay.quotas.n_reservations) == (0, 0)

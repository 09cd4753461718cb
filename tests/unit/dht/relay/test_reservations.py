"""Which relays a node that cannot be dialled takes, and in which order it names them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.errors import UnavailableError
from dht.framing import packed
from dht.relay.reservations import RelayOffer, Reservations
from dht.streams import Stream
from protocol import relay_pb2 as pb

QUIC, TCP = "/ip4/192.0.2.{}/udp/4001/quic-v1", "/ip4/192.0.2.{}/tcp/4001"
LIGHTHOUSES = [RelayOffer(f"lighthouse-{i}", TCP.format(i)) for i in range(3)]
HOSTS = [RelayOffer(f"host-{i}", QUIC.format(i)) for i in range(3)]
SEEDS = [str(seed) for seed in range(8)]


class Writer:
    def write(self, raw: bytes) -> None:
        """Nobody reads it."""

    async def drain(self) -> None:
        """Taken at once."""

    def close(self) -> None:
        """Nothing is open."""


class Links:
    """Every relay grants, but for those that refuse."""

    own_addresses: tuple[str, ...] = ()

    def __init__(self, refusing: frozenset[str] = frozenset()) -> None:
        self.refusing, self.asked = refusing, list[str]()

    async def open(self, offer: RelayOffer) -> Stream:
        self.asked.append(offer.peer_id)
        if offer.peer_id in self.refusing:
            raise UnavailableError("refused")
        reader, writer = asyncio.StreamReader(), Writer()
        reader.feed_data(packed(pb.RelayResponse()))
        stands_for: Any = writer
        return Stream(offer.peer_id, reader, stands_for)


def reservations(links: Links, offers: list[RelayOffer], seed: str) -> Reservations:
    stands_for: Any = links
    return Reservations(stands_for, stands_for, lambda: offers, lambda: None, seed)


@pytest.mark.parametrize("seed", SEEDS)
async def test_one_that_helps_both_ends_to_meet_is_taken_and_named_first(seed: str) -> None:
    kept = reservations(Links(), [*LIGHTHOUSES, HOSTS[0]], seed)
    await kept.reserve()
    assert kept.held[0] == "host-0"
    assert kept.held[1].startswith("lighthouse-")
    await kept.close()


async def test_the_other_one_may_be_any() -> None:
    seconds = set()
    for seed in SEEDS:
        kept = reservations(Links(), [*LIGHTHOUSES, *HOSTS], seed)
        await kept.reserve()
        seconds.add(kept.held[1].partition("-")[0])
        await kept.close()
    assert seconds == {"host", "lighthouse"}


async def test_who_refuses_is_passed_over_and_left_alone_for_a_while() -> None:
    links = Links(refusing=frozenset({"host-0", "lighthouse-1"}))
    kept = reservations(links, [HOSTS[0], LIGHTHOUSES[0], LIGHTHOUSES[1]], "seed")
    for _ in range(2):
        await kept.reserve()
    assert kept.held == ("lighthouse-0",)
    assert sorted(links.asked) == ["host-0", "lighthouse-0", "lighthouse-1"]
    await kept.close()


async def test_without_offers_nothing_is_held() -> None:
    kept = reservations(Links(), [], "seed")
    await kept.reserve()
    assert kept.held == ()
    await kept.close()

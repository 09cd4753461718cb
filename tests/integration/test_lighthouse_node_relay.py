"""Nodes that nobody dials are reached through lighthouses, which say in the run's directory that they are there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from dht.directory import Directory
from dht.framing import MAX_CONTROL_BYTES
from dht.record_versions import PERIOD_S, TTL_S
from dht.relay.relaying import RELAY_PROTOCOL
from dht.relay.reservations import RelayOffer
from protocol import relay_pb2 as pb
from protocol.identity import Identity
from tests.support.dht_nodes import MODEL, RUN, Start, eventually
from tests.support.lighthouse import Light, metric_becomes, needs_libp2p
from tests.support.relayed import WAIT_S, connect, echo_server, reservations_of, says, tunnels_apart

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from dht.node import DhtNode
    from dht.streams import Stream
    from tests.support.lighthouse import Lighthouse

pytestmark = needs_libp2p

RESERVE = pb.RelayRequest(reserve=pb.ReserveRequest())


def offer(lighthouse: Lighthouse) -> RelayOffer:
    address, _, peer_id = lighthouse.address.rpartition("/p2p/")
    return RelayOffer(peer_id, address)


async def metric(lighthouse: Lighthouse, name: str) -> float:
    return (await asyncio.to_thread(lighthouse.metrics))[name]


async def node_at(start: Start, *lighthouses: Lighthouse) -> DhtNode:
    return await start(initial_peers=tuple(lighthouse.address for lighthouse in lighthouses))


@asynccontextmanager
async def relay_stream(node: DhtNode, lighthouse: Lighthouse) -> AsyncIterator[Stream]:
    stream = await node.streams.open(offer(lighthouse).peer_id, RELAY_PROTOCOL, WAIT_S)
    with contextlib.closing(stream):
        yield stream


@asynccontextmanager
async def asked(node: DhtNode, lighthouse: Lighthouse, request: pb.RelayRequest) -> AsyncIterator[str]:
    """The relay's problem with a request; what it grants is held meanwhile."""
    async with relay_stream(node, lighthouse) as stream:
        await stream.send(request)
        yield (await stream.receive(pb.RelayResponse, WAIT_S)).problem


def connect_to(peer_id: str) -> pb.RelayRequest:
    return pb.RelayRequest(connect=pb.ConnectRequest(peer_id=peer_id))


async def test_bytes_pass_through_a_lighthouse_both_ways_and_are_counted(light: Light, start: Start) -> None:
    lighthouse = light()
    hidden, caller = await node_at(start, lighthouse), await node_at(start, lighthouse)
    kept = reservations_of(hidden, offer(lighthouse))
    await kept.reserve()
    assert kept.held == (offer(lighthouse).peer_id,)
    assert await metric(lighthouse, "kilohive_relay_reservations") == 1
    ways, message = tunnels_apart(caller, hidden.peer_id, offer(lighthouse)), bytes(range(256)) * 4096
    async with echo_server(hidden):
        endpoint = await ways.endpoint(hidden.peer_id, kept.held)
        assert await says(endpoint, message) == message
        assert await metric(lighthouse, "kilohive_relay_bytes_total") == 2 * len(message)
    await ways.close()
    await metric_becomes(lighthouse, "kilohive_relay_circuits", 0)
    await kept.close()
    await metric_becomes(lighthouse, "kilohive_relay_reservations", 0)


async def test_a_lighthouse_that_a_node_has_not_met_is_dialled(light: Light, start: Start) -> None:
    lighthouse = light()
    stranger = await start()
    kept = reservations_of(stranger, offer(lighthouse))
    await kept.reserve()
    assert kept.held == (offer(lighthouse).peer_id,)
    await kept.close()


async def test_a_reservation_outlives_a_silence_that_a_node_would_mind(
    light: Light, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dht.relay.reservations.SILENCE_S", 7.0)
    lighthouse = light()
    hidden = await node_at(start, lighthouse)
    async with relay_stream(hidden, lighthouse) as stream:
        await stream.send(RESERVE)
        assert (await stream.receive(pb.RelayResponse, WAIT_S)).problem == ""
        for _ in range(2):  # at once, and then every five seconds
            assert (await stream.receive(pb.RelayNote, 7.0)).peer_id == ""


async def test_when_one_of_two_lighthouses_is_killed_calls_take_the_other(light: Light, start: Start) -> None:
    one, two = light(name="one"), light(name="two")
    hidden, caller = await node_at(start, one, two), await node_at(start, one, two)
    kept = reservations_of(hidden, offer(one), offer(two))
    await kept.reserve()
    assert set(kept.held) == {offer(one).peer_id, offer(two).peer_id}
    relays = (offer(one).peer_id, offer(two).peer_id)
    ways = tunnels_apart(caller, hidden.peer_id, offer(one), offer(two))
    async with echo_server(hidden):
        reader, writer = await connect(await ways.endpoint(hidden.peer_id, relays))
        writer.write(b"hello")
        assert await asyncio.wait_for(reader.readexactly(5), WAIT_S) == b"hello"
        assert await metric(one, "kilohive_relay_circuits") == 1
        one.kill()
        assert await asyncio.wait_for(reader.read(), WAIT_S) == b"", "the connection has ended"
        writer.close()
        assert await says(await ways.endpoint(hidden.peer_id, relays), b"again") == b"again"

        async def only_the_other_is_held() -> bool:
            return kept.held == (offer(two).peer_id,)

        await eventually(only_the_other_is_held)
    await ways.close()
    await kept.close()


async def test_a_lighthouse_grants_no_more_than_its_flags_say(light: Light, start: Start) -> None:
    lighthouse = light("--max-reservations", "1", "--max-circuits", "1")
    hidden, caller = await node_at(start, lighthouse), await node_at(start, lighthouse)
    kept = reservations_of(hidden, offer(lighthouse))
    await kept.reserve()
    async with asked(caller, lighthouse, RESERVE) as problem:
        assert problem == "this relay has 1 reservations, the most it takes"
    to_hidden = connect_to(hidden.peer_id)
    one_more = asked(caller, lighthouse, to_hidden)
    async with echo_server(hidden), asked(caller, lighthouse, to_hidden) as first, one_more as second:
        assert (first, second) == ("", "this relay carries 1 circuits, 1 of yours")
    await kept.close()

    async def has_capacity() -> bool:
        async with asked(caller, lighthouse, RESERVE) as problem:
            return problem == ""

    await eventually(has_capacity)


async def test_a_circuit_is_cut_at_its_bytes_and_its_time(light: Light, start: Start) -> None:
    lighthouse = light("--set", "max_circuit_mb=1", "--set", "max_circuit_s=3")
    hidden, caller = await node_at(start, lighthouse), await node_at(start, lighthouse)
    kept = reservations_of(hidden, offer(lighthouse))
    await kept.reserve()
    ways = tunnels_apart(caller, hidden.peer_id, offer(lighthouse))
    async with echo_server(hidden):
        endpoint = await ways.endpoint(hidden.peer_id, kept.held)
        assert await says(endpoint, bytes(100_000)) == bytes(100_000)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await says(endpoint, bytes(1 << 20))
        reader, writer = await connect(endpoint)
        assert await asyncio.wait_for(reader.read(), WAIT_S) == b"", "its time is up"
        writer.close()
    await ways.close()
    await kept.close()


async def test_nobody_is_reached_who_has_not_reserved(light: Light, start: Start) -> None:
    lighthouse = light()
    caller = await node_at(start, lighthouse)
    for target in (caller.peer_id, Identity.generate().peer_id, "", "x" * 1000):
        async with asked(caller, lighthouse, connect_to(target)) as problem:
            assert "is not reached through this relay" in problem


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">I", MAX_CONTROL_BYTES + 1),
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 3) + b"\xff\xff\xff",
        struct.pack(">I", 0),
        b"\x00",
    ],
    ids=["a byte too long", "4 GB", "no message", "nothing wanted", "half a length"],
)
async def test_what_is_no_request_ends_its_stream_and_the_lighthouse_goes_on(
    light: Light, start: Start, raw: bytes
) -> None:
    lighthouse = light()
    caller = await node_at(start, lighthouse)
    async with relay_stream(caller, lighthouse) as stream:
        stream.writer.write(raw)
        async with asyncio.timeout(WAIT_S):
            await stream.reader.read()
    async with asked(caller, lighthouse, RESERVE) as problem:
        assert problem == ""


async def test_each_side_is_told_of_the_other_at_its_own_ip_address_alone(light: Light, start: Start) -> None:
    lighthouse = light()
    hidden, caller = await node_at(start, lighthouse), await node_at(start, lighthouse)
    told = ["/ip4/192.0.2.1/udp/53/quic-v1", "/ip4/127.0.0.1/udp/4001/quic-v1"]
    request = connect_to(hidden.peer_id)
    request.connect.addresses.extend(told)
    async with echo_server(hidden), relay_stream(hidden, lighthouse) as waiting:
        await waiting.send(pb.RelayRequest(reserve=pb.ReserveRequest(addresses=told)))
        assert (await waiting.receive(pb.RelayResponse, WAIT_S)).problem == ""
        async with relay_stream(caller, lighthouse) as calling:
            await calling.send(request)
            answer = await calling.receive(pb.RelayResponse, WAIT_S)
        note = pb.RelayNote()
        while not note.peer_id:
            note = await waiting.receive(pb.RelayNote, WAIT_S)
    assert note.peer_id == caller.peer_id
    for addresses in (note.addresses, answer.addresses):
        assert told[1] in addresses
        assert not any("192.0.2.1" in address for address in addresses)


async def directory_of(node: DhtNode) -> Directory:
    directory = Directory(node, RUN, MODEL)
    await directory.start()
    return directory


def listed(directory: Directory) -> set[RelayOffer]:
    """The lighthouses that a directory has, where they relay."""
    return {RelayOffer(peer.peer_id, peer.relay) for peer in directory.peers() if peer.role == "lighthouse"}


async def listed_at_last(directory: Directory, *wanted: RelayOffer, within_s: float = 60.0) -> set[RelayOffer]:
    """What is listed as soon as it is what is wanted, or else when the time is up."""

    async def is_so() -> bool:
        return listed(directory) == set(wanted)

    with contextlib.suppress(TimeoutError):
        await eventually(is_so, within_s)
    return listed(directory)


async def test_the_directory_has_a_lighthouse_until_it_leaves(light: Light, start: Start) -> None:
    node = await start()
    one, two = light(initial_peers=node.addresses, name="one"), light(initial_peers=node.addresses, name="two")
    directory = await directory_of(node)
    try:
        assert await listed_at_last(directory, offer(one), offer(two)) == {offer(one), offer(two)}
        os.kill(one.child.pid, signal.SIGINT)
        sooner_s = TTL_S - PERIOD_S  # than its record can end by itself
        assert await listed_at_last(directory, offer(two), within_s=sooner_s) == {offer(two)}
    finally:
        await directory.stop()


async def test_nodes_that_know_only_the_lighthouse_learn_that_it_relays(light: Light, start: Start) -> None:
    lighthouse = light()
    directory = await directory_of(await node_at(start, lighthouse))
    try:
        assert await listed_at_last(directory, offer(lighthouse)) == {offer(lighthouse)}
    finally:
        await directory.stop()


async def test_a_lighthouse_that_takes_no_reservations_offers_none(light: Light, start: Start) -> None:
    lighthouse = light("--max-reservations", "0")
    directory = await directory_of(await node_at(start, lighthouse))
    silent = RelayOffer(offer(lighthouse).peer_id, "")
    try:
        assert await listed_at_last(directory, silent) == {silent}
    finally:
        await directory.stop()

"""Peers that nobody dials are reached through a relay: real p2pd processes that here do not see each other."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from common.errors import UnavailableError
from dht.framing import MAX_CONTROL_BYTES
from dht.relay import tunnel as tunnel_module
from dht.relay.quotas import RelayLimits
from dht.relay.relay import Relay
from dht.relay.relaying import RELAY_PROTOCOL, TUNNEL_PROTOCOL
from dht.relay.reservations import RelayLinks, RelayOffer, punch
from dht.relay.tunnel import Tunnels, expose
from node.rpc.server import NodeServer
from protocol import relay_pb2 as pb
from protocol.endpoints import Address, relayed_endpoint
from protocol.identity import Identity
from protocol.security import NotConnectedError, Security
from tests.support.dht_nodes import Start, eventually
from tests.support.relayed import WAIT_S, connect, echo_server, reservations_of, says, tunnels_apart
from tests.support.watched_tunnels import watched_tunnels

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from dht.node import DhtNode
    from dht.relay.reservations import Reservations
    from dht.streams import Stream

PIECES = 64


class Swarm(NamedTuple):
    public: DhtNode
    hidden: DhtNode
    caller: DhtNode
    relay: Relay
    reservations: Reservations


def offer(node: DhtNode) -> RelayOffer:
    return RelayOffer(node.peer_id, node.relay_address)


def reservations(hidden: DhtNode, *relays: DhtNode) -> Reservations:
    return reservations_of(hidden, *map(offer, relays))


async def swarm_of(start: Start, limits: RelayLimits | None = None) -> Swarm:
    public = await start()
    hidden, caller = await start(public), await start(public)
    relay = Relay(public.streams, limits or RelayLimits())
    await relay.start()
    kept = reservations(hidden, public)
    await kept.reserve()
    return Swarm(public, hidden, caller, relay, kept)


def tunnels(swarm: Swarm) -> Tunnels:
    return tunnels_apart(swarm.caller, swarm.hidden.peer_id)


def without_address(peer_id: str) -> RelayOffer:
    return RelayOffer(peer_id, "")


async def test_bytes_pass_through_a_relay_both_ways_and_are_counted(start: Start) -> None:
    swarm = await swarm_of(start)
    ways, message = tunnels(swarm), bytes(range(256)) * 4096
    with watched_tunnels() as is_direct:
        async with echo_server(swarm.hidden):
            endpoint = await ways.endpoint(swarm.hidden.peer_id, (swarm.public.peer_id,))
            assert await says(endpoint, message) == message
    assert not is_direct[swarm.hidden.peer_id]
    assert swarm.relay.carried_bytes == 2 * len(message)
    await ways.close()
    await eventually(lambda: _is(swarm.relay.circuits, 0))


async def _is(value: int, expected: int) -> bool:
    return value == expected


async def test_a_connection_that_is_there_is_used_without_the_relay(start: Start) -> None:
    swarm = await swarm_of(start)
    await swarm.hidden.streams.dial(swarm.caller.peer_id, [swarm.caller.relay_address], WAIT_S)
    streams = swarm.caller.streams
    ways = Tunnels(streams, RelayLinks(streams), without_address)
    with watched_tunnels() as is_direct:
        async with echo_server(swarm.hidden):
            endpoint = await ways.endpoint(swarm.hidden.peer_id, (swarm.public.peer_id,))
            assert await says(endpoint, b"hello") == b"hello"
    assert is_direct[swarm.hidden.peer_id]
    assert swarm.relay.carried_bytes == 0
    await ways.close()


async def test_a_relayed_connection_is_closed_when_both_sides_have_met(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = await swarm_of(start)
    ways = tunnels(swarm)
    met = asyncio.Event()

    async def meets(*_: object) -> bool:
        await met.wait()
        return True

    monkeypatch.setattr(tunnel_module, "punch", meets)
    async with echo_server(swarm.hidden):
        endpoint = await ways.endpoint(swarm.hidden.peer_id, (swarm.public.peer_id,))
        reader, writer = await connect(endpoint)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        met.set()
        async with asyncio.timeout(WAIT_S):
            assert await reader.read() == b""
        writer.close()
    await ways.close()


async def test_a_relay_that_is_gone_is_left_for_another(start: Start) -> None:
    swarm = await swarm_of(start)
    second = await start(swarm.public)
    await Relay(second.streams, RelayLimits()).start()
    kept = reservations(swarm.hidden, second)
    await kept.reserve()
    assert kept.held == (second.peer_id,)
    ways = tunnels(swarm)
    async with echo_server(swarm.hidden):
        await swarm.public.stop()
        await eventually(lambda: _is(len(swarm.reservations.held), 0))
        endpoint = await ways.endpoint(swarm.hidden.peer_id, (swarm.public.peer_id, second.peer_id))
        assert await says(endpoint, b"hello") == b"hello"
    await ways.close()
    await kept.close()


async def test_a_relay_that_falls_silent_is_left(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = await swarm_of(start)
    silent = await start(swarm.public)
    monkeypatch.setattr("dht.relay.reservations.SILENCE_S", 0.5)

    async def grants_and_says_no_more(stream: Stream) -> None:
        await stream.receive(pb.RelayRequest, WAIT_S)
        await stream.send(pb.RelayResponse())
        await stream.reader.read()

    await silent.streams.serve(RELAY_PROTOCOL, grants_and_says_no_more)
    kept = reservations(swarm.hidden, silent)
    await kept.reserve()
    assert kept.held == (silent.peer_id,)
    await eventually(lambda: _is(len(kept.held), 0))


async def test_a_relay_takes_no_more_than_its_limits(start: Start) -> None:
    swarm = await swarm_of(start, RelayLimits(max_reservations=1, max_circuits=2, max_circuits_per_caller=1))
    kept = reservations(swarm.caller, swarm.public)
    await kept.reserve()
    assert (kept.held, swarm.relay.reservations) == ((), 1)
    hidden = swarm.hidden
    async with echo_server(hidden), asked(swarm, hidden.peer_id) as first, asked(swarm, hidden.peer_id) as second:
        assert first == ""
        assert second == "this relay carries 1 circuits, 1 of yours"


async def test_a_relay_that_is_full_is_named_with_its_limit_on_both_sides(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    swarm = await swarm_of(start, RelayLimits(max_reservations=1))
    kept = reservations(swarm.caller, swarm.public)
    for _ in range(2):
        kept.start_over()
        await kept.reserve()
    problem = "this relay has 1 reservations, the most it takes; its relay_reservations is 1"
    assert [message for message in caplog.messages if "reservations" in message] == [
        f"Relay: a peer is refused: {problem}",
        f"Relay {swarm.public.peer_id}: the relay refuses: {problem}",
    ]


@asynccontextmanager
async def asked(swarm: Swarm, target: str) -> AsyncIterator[str]:
    """The relay's problem with connecting the caller to `target`; a circuit that it grants is open meanwhile."""
    stream = await swarm.caller.streams.open(swarm.public.peer_id, RELAY_PROTOCOL, WAIT_S)
    with contextlib.closing(stream):
        await stream.send(pb.RelayRequest(connect=pb.ConnectRequest(peer_id=target)))
        yield (await stream.receive(pb.RelayResponse, WAIT_S)).problem


async def test_nobody_is_reached_who_has_not_reserved(start: Start) -> None:
    swarm = await swarm_of(start)
    for target in (swarm.caller.peer_id, Identity.generate().peer_id, "", "x" * 1000):
        async with asked(swarm, target) as problem:
            assert "is not reached through this relay" in problem


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">I", MAX_CONTROL_BYTES + 1),
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 3) + b"\xff\xff\xff",
        struct.pack(">I", 0),
    ],
    ids=["a byte too long", "4 GB", "no message", "nothing wanted"],
)
async def test_what_is_no_request_is_refused_and_the_relay_goes_on(start: Start, raw: bytes) -> None:
    swarm = await swarm_of(start)
    stream = await swarm.caller.streams.open(swarm.public.peer_id, RELAY_PROTOCOL, WAIT_S)
    stream.writer.write(raw)
    async with asyncio.timeout(WAIT_S):
        await stream.reader.read()
    stream.close()
    async with echo_server(swarm.hidden), asked(swarm, swarm.hidden.peer_id) as problem:
        assert problem == ""


async def test_a_relay_that_answers_with_nonsense_is_passed_over_for_the_next(start: Start) -> None:
    swarm = await swarm_of(start)
    lying = await start(swarm.public)

    async def answers_with_nonsense(stream: Stream) -> None:
        await stream.receive(pb.RelayRequest, WAIT_S)
        stream.writer.write(struct.pack(">I", MAX_CONTROL_BYTES + 1))
        await stream.reader.read()

    await lying.streams.serve(RELAY_PROTOCOL, answers_with_nonsense)
    ways = tunnels(swarm)
    async with echo_server(swarm.hidden):
        endpoint = await ways.endpoint(swarm.hidden.peer_id, (lying.peer_id, swarm.public.peer_id))
        assert await says(endpoint, b"hello") == b"hello"
    await ways.close()


async def test_a_relay_that_names_no_peer_to_dial_does_no_harm(start: Start) -> None:
    swarm = await swarm_of(start)
    lying = await start(swarm.public)

    async def sends_nonsense(stream: Stream) -> None:
        await stream.receive(pb.RelayRequest, WAIT_S)
        await stream.send(pb.RelayResponse())
        await stream.send(pb.RelayNote(peer_id="nobody", addresses=["/ip4/192.0.2.1/udp/1/quic-v1", "nowhere"]))
        await stream.send(pb.RelayNote())
        await stream.reader.read()

    await lying.streams.serve(RELAY_PROTOCOL, sends_nonsense)
    kept = reservations(swarm.hidden, lying)
    await kept.reserve()
    assert kept.held == (lying.peer_id,)
    assert not await punch(swarm.hidden.streams, "nobody", ["/ip4/192.0.2.1/udp/1/quic-v1"])
    assert kept.held == (lying.peer_id,)
    await kept.close()


async def test_a_caller_is_introduced_only_at_its_own_ip_address(start: Start) -> None:
    public = await start()
    hidden, caller = await start(public), await start(public)
    await Relay(public.streams, RelayLimits()).start()
    stream = await hidden.streams.open(public.peer_id, RELAY_PROTOCOL, WAIT_S)
    await stream.send(pb.RelayRequest(reserve=pb.ReserveRequest()))
    assert (await stream.receive(pb.RelayResponse, WAIT_S)).problem == ""
    async with echo_server(hidden):
        calling = await caller.streams.open(public.peer_id, RELAY_PROTOCOL, WAIT_S)
        told = ["/ip4/192.0.2.1/udp/53/quic-v1", "/ip4/127.0.0.1/udp/4001/quic-v1"]
        await calling.send(pb.RelayRequest(connect=pb.ConnectRequest(peer_id=hidden.peer_id, addresses=told)))
        assert (await calling.receive(pb.RelayResponse, WAIT_S)).problem == ""
        note = pb.RelayNote()
        async with asyncio.timeout(WAIT_S):
            while not note.peer_id:
                note = await stream.receive(pb.RelayNote, WAIT_S)
    assert note.peer_id == caller.peer_id
    assert "/ip4/127.0.0.1/udp/4001/quic-v1" in note.addresses
    assert not any("192.0.2.1" in address for address in note.addresses)
    stream.close()
    calling.close()


async def test_a_tunnel_that_nobody_uses_is_closed_and_opened_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = await swarm_of(start)
    monkeypatch.setattr(tunnel_module, "UNUSED_S", 0.2)
    ways, relays = tunnels(swarm), (swarm.public.peer_id,)
    first = await ways.endpoint(swarm.hidden.peer_id, relays)

    async def is_closed() -> bool:
        try:
            _, writer = await connect(first)
        except ConnectionRefusedError:
            return True
        writer.close()
        return False

    await asyncio.sleep(0.3)  # each connection begins the time anew
    await eventually(is_closed)
    async with echo_server(swarm.hidden):
        assert await says(await ways.endpoint(swarm.hidden.peer_id, relays), b"hello") == b"hello"
    await ways.close()


async def test_a_call_through_a_relay_is_pinned_to_the_peer_at_its_end(start: Start) -> None:
    """Somebody else's server at the end of the tunnel, or the relay's own, is not the peer."""
    swarm = await swarm_of(start)
    other = Security(Identity.generate())
    server = NodeServer((), (), "127.0.0.1", 0, other)
    await server.start()
    await expose(swarm.hidden.streams, server.endpoint)
    ways = tunnels(swarm)
    caller = Security(Identity.generate(), tunnels=ways).caller()
    endpoint = relayed_endpoint((swarm.public.peer_id,))
    try:
        with pytest.raises(NotConnectedError, match=f"proves to be {other.identity.peer_id}, not"):
            await caller.open(Address(swarm.hidden.peer_id, endpoint), WAIT_S)
    finally:
        await ways.close()
        await server.drain(0)


async def test_without_tunnels_a_relayed_peer_is_not_called() -> None:
    address = Address(Identity.generate().peer_id, relayed_endpoint((Identity.generate().peer_id,)))
    for security in (Security(Identity.generate()), Security(Identity.generate(), insecure_local=True)):
        with pytest.raises(NotConnectedError):
            await security.caller().open(address, WAIT_S)


async def test_streams_beyond_a_peers_share_are_closed_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.streams.MAX_STREAMS_PER_PEER", 1)
    public = await start()
    caller = await start(public)

    async def holds(stream: Stream) -> None:
        await stream.send(pb.RelayNote())
        await stream.reader.read()

    await public.streams.serve(TUNNEL_PROTOCOL, holds)
    first = await caller.streams.open(public.peer_id, TUNNEL_PROTOCOL, WAIT_S)
    await first.receive(pb.RelayNote, WAIT_S)
    second = await caller.streams.open(public.peer_id, TUNNEL_PROTOCOL, WAIT_S)
    with pytest.raises(UnavailableError):
        await second.receive(pb.RelayNote, WAIT_S)
    first.close()
    second.close()

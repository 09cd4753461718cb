"""A lighthouse's relay between real p2pd peers: whom nobody can dial is reached through it, within its limits."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure

from common.errors import InvalidInputError
from coordinator.lighthouse.connection_limits import MAX_STREAMS_PER_PEER
from coordinator.lighthouse.libp2p_pb2 import (
    MALFORMED_MESSAGE,
    NO_RESERVATION,
    OK,
    PERMISSION_DENIED,
    RESERVATION_REFUSED,
    RESOURCE_LIMIT_EXCEEDED,
    UNEXPECTED_MESSAGE,
    CircuitPeer,
    HopMessage,
    KademliaMessage,
)
from coordinator.lighthouse.wire import framed, read_message
from tests.support.dht_nodes import eventually
from tests.support.lighthouse import Light, needs_libp2p

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from google.protobuf.message import Message
    from hivemind.p2p import PeerID

    from coordinator.lighthouse.wire import M
    from tests.support.lighthouse import Lighthouse

pytestmark = [
    needs_libp2p,
    # hivemind leaves the writer of a call that p2pd refused
    pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning"),
]

HOP = "/libp2p/circuit/relay/0.2.0/hop"
KADEMLIA = "/ipfs/kad/1.0.0"
PING = KademliaMessage(kind=KademliaMessage.PING)
RESERVE = HopMessage(kind=HopMessage.RESERVE)


@asynccontextmanager
async def peer_of(*lighthouses: Lighthouse) -> AsyncIterator[P2P]:
    """A peer that knows only the lighthouses."""
    p2p = await started(*lighthouses)
    try:
        yield p2p
    finally:
        await p2p.shutdown()


@asynccontextmanager
async def hidden_peer_of(*lighthouses: Lighthouse, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[P2P]:
    """A peer that listens nowhere and reserves at every lighthouse; it echoes."""
    arguments = P2P._make_process_args
    # Otherwise p2pd looks for public relays first, for minutes.
    monkeypatch.setattr(P2P, "_make_process_args", staticmethod(lambda *a, **k: [*arguments(*a, **k), NO_DISCOVERY]))
    relays = [lighthouse.address for lighthouse in lighthouses]
    p2p = await started(
        *lighthouses, trusted_relays=relays, force_reachability="private", use_auto_relay=True, no_listen=True
    )
    try:
        await p2p.add_binary_stream_handler("echo", echo)
        for lighthouse in lighthouses:
            await reserved(lighthouse, 1)
        yield p2p
    finally:
        await p2p.shutdown()


async def started(*lighthouses: Lighthouse, **settings: object) -> P2P:
    """hivemind's p2pd ends if its first dial fails, on a busy machine for one; ours dials again (dht/bootstrap.py)."""
    known = [lighthouse.address for lighthouse in lighthouses]
    for tries_left in (2, 1, 0):
        try:
            return await P2P.create(initial_peers=known, auto_nat=False, nat_port_map=False, **settings)
        except P2PDaemonError:
            if not tries_left:
                raise
    raise AssertionError


NO_DISCOVERY = "-relayDiscovery=0"


async def echo(_info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with contextlib.suppress(ConnectionError):  # circuits are cut here
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
    finally:
        writer.close()  # also where the peer shuts down, and so cancels this


async def reserved(lighthouse: Lighthouse, wanted: int) -> None:
    async def is_so() -> bool:
        return (await asyncio.to_thread(lighthouse.metrics))["kilohive_relay_reservations"] == wanted

    await eventually(is_so)


@asynccontextmanager
async def stream_of(p2p: P2P, peer: PeerID, protocol: str) -> AsyncIterator[Raw]:
    """A stream, closed at the end; p2pd may take a moment after its start to know whom to ask where the peer is."""
    opened: list[Raw] = []

    async def is_open() -> bool:
        with contextlib.suppress(ControlFailure):
            _, *ends = await p2p.call_binary_stream_handler(peer, protocol)
            opened.append(Raw(*ends))
        return bool(opened)

    await eventually(is_open)
    (stream,) = opened
    try:
        yield stream
    finally:
        stream.writer.close()
        with contextlib.suppress(ConnectionError):
            await stream.writer.wait_closed()


class Raw(NamedTuple):
    """Both ends of a stream of bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, message: Message, answer: type[M]) -> M:
        """Send one message and read the answer."""
        self.writer.write(framed(message))
        await self.writer.drain()
        return await asyncio.wait_for(read_message(self.reader.read, answer, 1 << 20), 15)

    async def echo(self, n_bytes: int) -> bytes:
        """Send bytes and read as many."""
        self.writer.write(bytes(n_bytes))
        return await asyncio.wait_for(self.reader.readexactly(n_bytes), 30)


async def asked(p2p: P2P, lighthouse: Lighthouse, message: HopMessage) -> HopMessage:
    """What the relay answers to one message on a stream of its own."""
    async with stream_of(p2p, lighthouse.peer_id, HOP) as stream:
        return await stream.ask(message, HopMessage)


def connect_to(peer: bytes) -> HopMessage:
    return HopMessage(kind=HopMessage.CONNECT, peer=CircuitPeer(id=peer))


async def test_peers_that_know_only_the_lighthouse_reach_who_listens_nowhere(
    light: Light, monkeypatch: pytest.MonkeyPatch
) -> None:
    lighthouse = light()
    async with (
        hidden_peer_of(lighthouse, monkeypatch=monkeypatch) as hidden,
        peer_of(lighthouse) as caller,
        stream_of(caller, hidden.peer_id, "echo") as stream,
    ):
        await stream.echo(3 << 20)
        ways = [way for peer in await caller.list_peers() if peer.peer_id == hidden.peer_id for way in peer.addrs]
        assert [str(way) for way in ways] == [f"{lighthouse.address}/p2p-circuit"]
        metrics = await asyncio.to_thread(lighthouse.metrics)
        assert metrics["kilohive_relay_circuits"] == 1
        assert metrics["kilohive_relay_bytes_total"] > 6 << 20


async def test_when_the_lighthouse_in_use_is_killed_another_relays(
    light: Light, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = (light(name="one"), light(name="two"))
    async with hidden_peer_of(*both, monkeypatch=monkeypatch) as hidden, peer_of(*both) as caller:
        async with stream_of(caller, hidden.peer_id, "echo") as stream:
            await stream.echo(1)
            (used,) = [one for one in both if (await asyncio.to_thread(one.metrics))["kilohive_relay_circuits"]]
            used.kill()
            assert await asyncio.wait_for(stream.reader.read(1), 15) == b"", "the stream has ended"
        async with stream_of(caller, hidden.peer_id, "echo") as stream:
            await stream.echo(1 << 16)


async def test_a_circuit_is_cut_at_its_bytes(light: Light, monkeypatch: pytest.MonkeyPatch) -> None:
    lighthouse = light("--set", "max_circuit_mb=1")
    async with (
        hidden_peer_of(lighthouse, monkeypatch=monkeypatch) as hidden,
        peer_of(lighthouse) as caller,
        stream_of(caller, hidden.peer_id, "echo") as stream,
    ):
        await stream.echo(100_000)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await stream.echo(1 << 20)
        metrics = await asyncio.to_thread(lighthouse.metrics)
        assert 200_000 < metrics["kilohive_relay_bytes_total"] <= 1 << 20


async def test_a_circuit_is_cut_when_its_time_is_up(light: Light, monkeypatch: pytest.MonkeyPatch) -> None:
    lighthouse = light("--set", "max_circuit_s=2")
    async with (
        hidden_peer_of(lighthouse, monkeypatch=monkeypatch) as hidden,
        peer_of(lighthouse) as caller,
        stream_of(caller, hidden.peer_id, "echo") as stream,
    ):
        await stream.echo(1)
        assert await asyncio.wait_for(stream.reader.read(1), 15) == b"", "the stream has ended"


async def test_circuits_over_the_limit_are_refused(light: Light, monkeypatch: pytest.MonkeyPatch) -> None:
    lighthouse = light("--max-circuits", "1")
    async with (
        hidden_peer_of(lighthouse, monkeypatch=monkeypatch) as hidden,
        peer_of(lighthouse) as caller,
        stream_of(caller, hidden.peer_id, "echo") as stream,
    ):
        await stream.echo(1)
        refused = await asked(caller, lighthouse, connect_to(hidden.peer_id.to_bytes()))
        assert refused.status == RESOURCE_LIMIT_EXCEEDED
        await stream.echo(1)


async def test_reservations_over_the_limit_are_refused_until_somebody_leaves(light: Light) -> None:
    lighthouse = light("--max-reservations", "1")
    async with peer_of(lighthouse) as other:
        async with peer_of(lighthouse) as first:
            answer = await asked(first, lighthouse, RESERVE)
            assert (answer.status, answer.limit.data_bytes) == (OK, 4096 << 20)
            assert (await asked(first, lighthouse, RESERVE)).status == OK, "it renews"
            assert (await asked(other, lighthouse, RESERVE)).status == RESERVATION_REFUSED

        async def has_capacity() -> bool:
            return (await asked(other, lighthouse, RESERVE)).status == OK

        await eventually(has_capacity)


async def test_nobody_reserves_in_anothers_name_or_reaches_who_has_not_reserved(light: Light) -> None:
    lighthouse = light()
    async with peer_of(lighthouse) as peer, peer_of(lighthouse) as victim:
        forged = HopMessage(kind=HopMessage.RESERVE, peer=CircuitPeer(id=victim.peer_id.to_bytes()))
        assert (await asked(peer, lighthouse, forged)).status == PERMISSION_DENIED
        assert (await asked(peer, lighthouse, connect_to(victim.peer_id.to_bytes()))).status == NO_RESERVATION
        assert (await asked(peer, lighthouse, HopMessage())).status == UNEXPECTED_MESSAGE
        assert (await asked(peer, lighthouse, connect_to(bytes(5000)))).status == MALFORMED_MESSAGE
        assert (await asyncio.to_thread(lighthouse.metrics))["kilohive_relay_reservations"] == 0


async def test_kademlia_finds_nodes_and_keeps_nothing(light: Light) -> None:
    lighthouse = light()
    async with (
        peer_of(lighthouse) as peer,
        peer_of(lighthouse) as other,
        stream_of(peer, lighthouse.peer_id, KADEMLIA) as stream,
    ):
        find = KademliaMessage(kind=KademliaMessage.FIND_NODE, key=other.peer_id.to_bytes())

        async def is_found() -> bool:
            answer = await stream.ask(find, KademliaMessage)
            return [found.id for found in answer.closer_peers if found.addresses] == [other.peer_id.to_bytes()]

        await eventually(is_found)
        assert (await stream.ask(PING, KademliaMessage)).kind == KademliaMessage.PING
        with pytest.raises(InvalidInputError, match="ends"):
            await stream.ask(KademliaMessage(kind=KademliaMessage.PUT_VALUE, key=b"/pk/x"), KademliaMessage)


async def test_streams_of_one_peer_are_bounded(light: Light) -> None:
    lighthouse = light()
    async with contextlib.AsyncExitStack() as stack:
        greedy = await stack.enter_async_context(peer_of(lighthouse))
        modest = await stack.enter_async_context(peer_of(lighthouse))
        for _ in range(MAX_STREAMS_PER_PEER + 20):
            await stack.enter_async_context(stream_of(greedy, lighthouse.peer_id, HOP))

        async def are_refused() -> bool:
            return (await asyncio.to_thread(lighthouse.metrics))["kilohive_lighthouse_refused_total"] >= 20

        await eventually(are_refused)
        assert (await asked(modest, lighthouse, RESERVE)).status == OK

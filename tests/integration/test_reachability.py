"""A node learns from others whether it can be called, over real TLS."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from common.events import EventLog
from dht.view import PeerInfo
from node.membership import reachability
from node.membership.reachability import DIAL_BACK, SERVICE_NAME, DialBackService, ReachabilityWatch
from node.rpc.server import NodeServer
from protocol import reach_pb2 as pb
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.security import Security
from tests.support.events import written_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ME, OTHER, THIRD = (Security(Identity.generate()) for _ in range(3))
WAIT_S = 10.0


@asynccontextmanager
async def node(security: Security) -> AsyncIterator[str]:
    """The endpoint of a node that dials others back."""
    server = NodeServer(
        (DialBackService(security.caller(), "127.0.0.1").handler(),), (SERVICE_NAME,), "127.0.0.1", 0, security
    )
    await server.start()
    try:
        yield server.endpoint
    finally:
        await server.drain(0)


def peer(security: Security, endpoint: str) -> PeerInfo:
    return PeerInfo(
        peer_id=security.identity.peer_id,
        role="host",
        endpoint=endpoint,
        software="",
        started_s=0,
        n_blocks=0,
        tokens_per_s=0,
        run_tokens=0,
        queue_tokens=0,
        expiration_s=2e9,
    )


def watch(*peers: PeerInfo) -> tuple[ReachabilityWatch, list[Any]]:
    events, told = EventLog(), list[Any]()
    events.subscribe(written_to(told))
    own_id = ME.identity.peer_id
    return ReachabilityWatch(ME.caller(), lambda: peers, own_id, events), told


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_node_that_others_can_call_learns_so_and_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with node(ME) as mine, node(OTHER) as theirs:
        look, told = watch(peer(ME, mine), peer(OTHER, theirs))
        for _ in range(2):
            await look.look(mine)
    assert look.state == "reached"
    assert [(event["state"], event["observed"], event["asked"]) for event in told] == [("reached", "127.0.0.1", 1)]
    assert caplog.text.count(f"Others can call this node at {mine}") == 1


async def test_a_node_whose_port_is_shut_is_told_what_to_open(caplog: pytest.LogCaptureFixture) -> None:
    port = closed_port()
    async with node(OTHER) as theirs:
        look, told = watch(peer(OTHER, theirs))
        await look.look(f"127.0.0.1:{port}")
    assert look.state == "not reached"
    assert "cannot be reached" in told[0]["problem"]
    assert f"let port {port} in through this machine's firewall" in caplog.text


async def test_somebody_else_at_the_port_is_not_this_node() -> None:
    async with node(THIRD) as thirds, node(OTHER) as theirs:
        look, told = watch(peer(OTHER, theirs))
        await look.look(thirds)
    assert look.state == "not reached"
    assert f"proves to be {THIRD.identity.peer_id}" in told[0]["problem"]


async def test_a_node_that_is_seen_elsewhere_than_it_announces_is_not_reached(caplog: pytest.LogCaptureFixture) -> None:
    async with node(ME) as mine, node(OTHER) as theirs:
        look, _ = watch(peer(OTHER, theirs))
        await look.look("192.0.2.7:" + mine.rpartition(":")[2])
    assert look.state == "not reached"
    assert "they see it at 127.0.0.1, as behind a home's NAT" in caplog.text


async def test_nobody_to_ask_or_nobody_who_answers_says_nothing() -> None:
    gone = peer(OTHER, f"127.0.0.1:{closed_port()}")
    for others in ((), (gone,)):
        look, told = watch(*others)
        await look.look("127.0.0.1:4000")
        assert (look.state, told) == ("unknown", [])


async def ask(server: str, raw: bytes) -> bytes:
    caller, address = ME.caller(), Address(OTHER.identity.peer_id, server)
    async with await caller.open(address, WAIT_S) as channel:
        call = channel.unary_unary(DIAL_BACK, bytes, bytes)
        answer: bytes = await call(raw, timeout=WAIT_S, metadata=caller.metadata(address, DIAL_BACK))
    return answer


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\xff\xff", "not a whole"),
        (b"", "port: must be from 1 to 65535, is 0"),
        (pb.DialBackRequest(port=65_536).SerializeToString(), "port: must be from 1 to 65535, is 65536"),
    ],
)
async def test_a_bad_request_is_refused_by_field(raw: bytes, words: str) -> None:
    async with node(OTHER) as theirs:
        with pytest.raises(grpc.aio.AioRpcError, match=words):
            await ask(theirs, raw)


async def test_no_more_than_a_few_are_dialled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "MAX_DIALLING", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        request = pb.DialBackRequest(port=silent.getsockname()[1]).SerializeToString()
        async with node(OTHER) as theirs:
            first = asyncio.create_task(ask(theirs, request))
            connection, _ = await asyncio.get_running_loop().run_in_executor(None, silent.accept)
            with connection, pytest.raises(grpc.aio.AioRpcError, match="already dials 1 others back"):
                await ask(theirs, request)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

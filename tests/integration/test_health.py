"""`health` against real servers: a node that serves, one that is stopped, one that is somebody else, one that hangs."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from common.errors import UnavailableError
from common.text import moment_text
from node.limits.availability_file import write_availability
from node.limits.events import AvailabilityEvent, HeldReason
from node.rpc.config import HealthConfig
from node.rpc.health import run_health, server_told
from node.rpc.server import NodeServer
from protocol.admission import Admission
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.security import Security
from protocol.swarm_file import SwarmFile
from tests.support.dht_nodes import running_nodes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

HOST = Security(Identity.generate())


@asynccontextmanager
async def serving(security: Security = HOST) -> AsyncIterator[NodeServer]:
    server = NodeServer((), (), "127.0.0.1", 0, security)
    await server.start()
    try:
        yield server
    finally:
        await server.drain(0)


async def ask(folder: Path, *, timeout_s: float = 10.0, insecure_local: bool = False) -> None:
    await run_health(HealthConfig(state=folder, timeout_s=timeout_s, insecure_local=insecure_local), asyncio.Event())


def at(server: NodeServer, security: Security = HOST) -> Address:
    return Address(security.identity.peer_id, server.endpoint)


async def test_a_node_that_serves_is_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving() as server:
        with server_told(tmp_path, at(server)):
            await ask(tmp_path)
        assert capsys.readouterr().out == f"{HOST.identity.peer_id} at {server.endpoint}: SERVING\n"


async def test_a_host_that_is_paused_is_healthy_and_says_why_since_when_and_until_when(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = (
        HeldReason(name="owner", why="its owner paused it", since_s=1e9, until_s=1.00001e9),
        HeldReason(name="program", why="steam runs", since_s=1e9, until_s=None),
    )
    unknown = "whether somebody uses keyboard or mouse is not known: it counts as nobody"
    async with serving() as server:
        with server_told(tmp_path, at(server)):
            write_availability(tmp_path, AvailabilityEvent(reasons=reasons, unknown=(unknown,)))
            await ask(tmp_path)
            assert capsys.readouterr().out.splitlines()[1:] == [
                f"paused since {moment_text(1e9)} until {moment_text(1.00001e9)}: its owner paused it",
                f"paused since {moment_text(1e9)}: steam runs",
                unknown,
            ]
            write_availability(tmp_path, AvailabilityEvent(reasons=(), unknown=()))
            await ask(tmp_path)
            assert len(capsys.readouterr().out.splitlines()) == 1


async def test_a_node_that_cannot_serve_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving() as server:
        with server_told(tmp_path, at(server)):
            await server.report("CUDA error: no kernel image is \u201cavailable\u201d")
            with pytest.raises(UnavailableError, match=r"is NOT_SERVING: CUDA error: no kernel image is \?available\?"):
                await ask(tmp_path)
            await server.report("")
            await ask(tmp_path)
    assert "SERVING" in capsys.readouterr().out


async def test_a_node_without_encryption_is_asked_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(Security(HOST.identity, insecure_local=True)) as server:
        with server_told(tmp_path, at(server)):
            await ask(tmp_path, insecure_local=True)
            with pytest.raises(UnavailableError, match=r"does not speak TLS|cannot be reached"):
                await ask(tmp_path)
    assert "SERVING" in capsys.readouterr().out


async def test_a_node_of_a_closed_run_leaves_its_token_for_who_asks_on_its_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    admission = Admission("demo-1", bytes(range(32)))
    async with serving(Security(HOST.identity, admission=admission)) as server:
        with server_told(tmp_path, at(server)), pytest.raises(UnavailableError, match="only those with its invite"):
            await ask(tmp_path)
        with server_told(tmp_path, at(server), admission=admission):
            assert (tmp_path / "server.json").stat().st_mode & 0o777 == 0o600
            await ask(tmp_path)
    assert "SERVING" in capsys.readouterr().out


async def test_a_node_that_is_gone_is_not(tmp_path: Path) -> None:
    async with serving() as server:
        address = at(server)
    with server_told(tmp_path, address), pytest.raises(UnavailableError, match="cannot be reached"):
        await ask(tmp_path)


async def test_a_node_that_takes_no_more_calls_is_not(tmp_path: Path) -> None:
    async with serving() as server:
        await server._health.enter_graceful_shutdown()
        with server_told(tmp_path, at(server)), pytest.raises(UnavailableError, match="is NOT_SERVING"):
            await ask(tmp_path)


async def test_another_node_at_the_endpoint_does_not_count(tmp_path: Path) -> None:
    other = Security(Identity.generate())
    async with serving(other) as server:
        with server_told(tmp_path, at(server)), pytest.raises(UnavailableError, match="proves to be"):
            await ask(tmp_path)


def swarm_file(folder: Path, host: str, port: int) -> None:
    peer = f"/ip4/{host}/tcp/{port}/p2p/{HOST.identity.peer_id}"
    SwarmFile(run_id="demo-1", initial_peers=(peer,)).write(folder / "swarm.toml")


async def test_a_coordinator_is_healthy_while_its_dht_node_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_nodes() as start_one:
        node = await start_one()
        _, _, host, _, port, *_ = node.addresses[0].split("/")
        swarm_file(tmp_path, host, int(port))
        await ask(tmp_path)
    assert capsys.readouterr().out == f"{host} port {port}: the DHT node answers\n"
    with pytest.raises(UnavailableError, match="its DHT node does not answer"):
        await ask(tmp_path)


async def test_a_dht_node_that_hangs_costs_no_more_than_the_timeout(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        swarm_file(tmp_path, *silent.getsockname())
        with pytest.raises(UnavailableError, match=r"did not answer within 0\.2 s"):
            await ask(tmp_path, timeout_s=0.2)

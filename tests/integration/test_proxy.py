"""Nodes call each other directly whatever proxy the environment names: it is for the web, and no peer is behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest
from grpc_health.v1 import health_pb2

from node.rpc.health import CHECK
from node.rpc.server import NodeServer
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.security import Security
from tests.support.dht_nodes import running_nodes

if TYPE_CHECKING:
    import grpc

    Check = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

PROXIES = [*(names := ["http_proxy", "https_proxy", "all_proxy"]), *map(str.upper, names), "grpc_proxy"]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, NOBODY)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("insecure_local", [False, True])
async def test_a_call_between_nodes_uses_no_proxy(proxies: None, *, insecure_local: bool) -> None:
    security = Security(Identity.generate(), insecure_local=insecure_local)
    server = NodeServer((), (), "127.0.0.1", 0, security)
    await server.start()
    caller = Security(Identity.generate(), insecure_local=insecure_local).caller()
    address = Address(security.identity.peer_id, server.endpoint)
    try:
        async with await caller.open(address, 10.0) as channel:
            check: Check = channel.unary_unary(CHECK)
            answer = await check(b"", metadata=caller.metadata(address, CHECK), timeout=10.0)
    finally:
        await server.drain(0)
    assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING


async def test_p2pd_is_told_of_no_proxy(proxies: None) -> None:
    async with running_nodes() as start_one:
        node = await start_one()
        environment = psutil.Process(node.daemon_pid).environ()
    assert not {"http_proxy", "https_proxy", "all_proxy"} & {name.lower() for name in environment}

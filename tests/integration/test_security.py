"""Who may call whom, over real TLS: a pinned peer and a signing caller, and everybody else refused."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import grpc
import pytest
from grpc_health.v1 import health_pb2

from common.errors import ConfigError, DeadlineError, UnauthenticatedError, UnavailableError
from node.rpc.handlers import CallCounts, unary
from node.rpc.server import NodeServer
from node.trainer.dispatch.client import ExpertClient
from protocol import expert_pb2 as pb
from protocol.admission import Admission
from protocol.call_signature import CALLER_KEY
from protocol.certificate import certificate_of
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.security import Caller, NotConnectedError, Security
from protocol.version import PROTOCOL_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

HOST, STRANGER, TRAINER = (Security(Identity.generate()) for _ in range(3))
SERVICE = f"{pb.DESCRIPTOR.package}.Expert"
WAIT_S = 10.0


@asynccontextmanager
async def serving(security: Security = HOST, port: int = 0) -> AsyncIterator[NodeServer]:
    async def describe(request: pb.DescribeRequest, timeout_s: float) -> pb.DescribeResponse:
        return pb.DescribeResponse(run_id=request.run_id, peer_id=security.identity.peer_id)

    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(unary(pb.DescribeRequest, describe, CallCounts()))
    }
    handler = grpc.method_handlers_generic_handler(SERVICE, methods)
    server = NodeServer((handler,), (SERVICE,), "127.0.0.1", port, security)
    await server.start()
    try:
        yield server
    finally:
        await server.drain(0)


@asynccontextmanager
async def calling(security: Security = TRAINER) -> AsyncIterator[ExpertClient]:
    client = ExpertClient(security.caller())
    try:
        yield client
    finally:
        await client.close()


def at(server: NodeServer, security: Security = HOST) -> Address:
    return Address(security.identity.peer_id, server.endpoint)


async def ask(client: ExpertClient, address: Address) -> pb.DescribeResponse:
    return await client.describe(address, pb.DescribeRequest(run_id="r"), WAIT_S)


async def outcomes_after(successor: Security) -> list[object]:
    """Of four calls to a host whose endpoint `successor` has taken over."""
    async with calling() as client:
        async with serving() as server:
            await ask(client, at(server))
            address, port = at(server), int(server.endpoint.rpartition(":")[2])
        async with serving(successor, port):
            tries = [await asyncio.gather(ask(client, address), return_exceptions=True) for _ in range(4)]
    return [outcome for (outcome,) in tries]


async def test_a_signed_call_reaches_the_peer_that_was_meant() -> None:
    async with serving() as server, calling() as client:
        answers = await asyncio.gather(*(ask(client, at(server)) for _ in range(20)))
    assert {answer.peer_id for answer in answers} == {HOST.identity.peer_id}


async def test_another_peer_at_the_endpoint_is_not_called() -> None:
    async with serving(STRANGER) as server, calling() as client:
        with pytest.raises(NotConnectedError, match=f"proves to be {STRANGER.identity.peer_id}, not"):
            await ask(client, at(server))


async def test_a_peer_that_takes_the_endpoint_over_is_not_called_on_the_old_channel() -> None:
    told = await outcomes_after(STRANGER)
    assert all(isinstance(error, UnavailableError) for error in told)
    assert "proves to be" in str(told[-1])


async def test_a_peer_that_was_started_again_is_called_with_its_new_certificate() -> None:
    # A call that leaves on the old connection is lost; one that finds it closed learns of the new certificate.
    told = await outcomes_after(HOST)
    assert {type(outcome) for outcome in told[:-1]} & {UnavailableError, NotConnectedError}
    assert getattr(told[-1], "peer_id", told[-1]) == HOST.identity.peer_id


async def test_a_server_without_tls_is_not_called() -> None:
    async with serving(Security(HOST.identity, insecure_local=True)) as server, calling() as client:
        with pytest.raises(NotConnectedError, match=r"does not speak TLS|cannot be reached"):
            await ask(client, at(server))


async def test_a_plaintext_dial_is_refused() -> None:
    async with serving() as server, calling(Security(TRAINER.identity, insecure_local=True)) as client:
        with pytest.raises(NotConnectedError):
            await ask(client, at(server))


async def test_a_caller_that_does_not_sign_is_refused_health_too() -> None:
    async with serving() as server:
        channel = await HOST.caller().open(at(server), WAIT_S)
        async with channel:
            for method in (f"/{SERVICE}/Describe", "/grpc.health.v1.Health/Check"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(method, bytes, bytes)(b"", timeout=WAIT_S)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_answers_who_signs() -> None:
    async with serving() as server:
        caller, method = TRAINER.caller(), "/grpc.health.v1.Health/Check"
        async with await caller.open(at(server), WAIT_S) as channel:
            check = channel.unary_unary(method, bytes, bytes)
            raw: bytes = await check(b"", metadata=caller.metadata(at(server), method), timeout=WAIT_S)
    assert health_pb2.HealthCheckResponse.FromString(raw).status == health_pb2.HealthCheckResponse.SERVING


class _Signing(Caller):
    """Sends metadata that was made for something else."""

    def __init__(self, metadata: tuple[tuple[str, bytes], ...]) -> None:
        super().__init__(TRAINER)
        self._sent = metadata

    def metadata(self, address: Address, method: str) -> tuple[tuple[str, bytes], ...]:
        return self._sent


def signed_for(server: Security, method: str) -> tuple[tuple[str, bytes], ...]:
    return TRAINER.caller().metadata(Address(server.identity.peer_id, ""), f"/{SERVICE}/{method}")


@pytest.mark.parametrize(
    ("sign", "reason"),
    [
        (lambda: signed_for(STRANGER, "Describe"), "not for this call"),
        (lambda: signed_for(HOST, "Forward"), "not for this call"),
        (lambda: ((CALLER_KEY, bytes([PROTOCOL_VERSION]) + b"\0" * 116),), "signed .* ago"),
        (lambda: ((CALLER_KEY, b"\2" + b"\0" * 116),), f"speaks 2, this kilohive speaks {PROTOCOL_VERSION}"),
        (tuple, "every call must be signed"),
    ],
    ids=["for another server", "for another method", "long ago", "of another version", "not at all"],
)
async def test_a_signature_for_something_else_is_refused(
    sign: Callable[[], tuple[tuple[str, bytes], ...]], reason: str
) -> None:
    async with serving() as server:
        client = ExpertClient(_Signing(sign()))
        with pytest.raises(UnauthenticatedError, match=reason):
            await ask(client, at(server))
        await client.close()


async def test_a_replayed_signature_is_refused() -> None:
    async with serving() as server:
        client = ExpertClient(_Signing(signed_for(HOST, "Describe")))
        await ask(client, at(server))
        with pytest.raises(UnauthenticatedError, match="used before"):
            await ask(client, at(server))
        await client.close()


def closed(security: Security) -> Security:
    """The same peer, with the token of a closed run."""
    return replace(security, admission=Admission("r", bytes(range(32))))


async def test_a_host_of_a_closed_run_answers_only_who_shows_a_ticket() -> None:
    host = closed(HOST)
    async with serving(host) as server:
        async with calling(closed(TRAINER)) as invited:
            assert (await ask(invited, at(server))).peer_id == HOST.identity.peer_id
        overheard = _Signing((*signed_for(HOST, "Describe"), *closed(STRANGER).caller().metadata(at(server), "")[1:]))
        for caller in (TRAINER.caller(), overheard):
            client = ExpertClient(caller)
            with pytest.raises(UnauthenticatedError, match="this run admits only those with its invite: join with it"):
                await ask(client, at(server))
            await client.close()


async def test_a_peer_of_a_closed_run_can_call_an_open_host() -> None:
    async with serving() as server, calling(closed(TRAINER)) as client:
        assert (await ask(client, at(server))).peer_id == HOST.identity.peer_id


async def test_a_port_that_says_nothing_costs_no_more_than_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with calling() as client:
            address = Address(HOST.identity.peer_id, f"127.0.0.1:{silent.getsockname()[1]}")
            with pytest.raises(DeadlineError):
                await client.describe(address, pb.DescribeRequest(), 0.5)


async def test_plain_calls_stay_on_this_machine() -> None:
    plain = Security(HOST.identity, insecure_local=True)
    with pytest.raises(ConfigError, match="insecure_local: only with --listen 127"):
        NodeServer((), (), "192.0.2.1", 0, plain)
    with pytest.raises(NotConnectedError, match="calls this machine only"):
        await plain.caller().open(Address(HOST.identity.peer_id, "192.0.2.1:4000"), WAIT_S)


class SlowTlsServer:
    """A server in a thread, that answers a TLS greeting when it is told to and then waits for the caller to go."""

    def __init__(self, folder: Path) -> None:
        certificate = certificate_of(HOST.identity, time.time())
        (folder / "chain.pem").write_bytes(certificate.chain)
        (folder / "key.pem").write_bytes(certificate.key)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "chain.pem", folder / "key.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.greeted, self.go, self.answered, self.left = (threading.Event() for _ in range(4))
        self._thread = threading.Thread(target=self._serve)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._context.wrap_bio(incoming, outgoing, server_side=True)
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(WAIT_S)
            incoming.write(connection.recv(65_536))
            self.greeted.set()
            self.go.wait(WAIT_S)
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            connection.sendall(outgoing.read())
            self.answered.set()
            with contextlib.suppress(ConnectionError):
                while connection.recv(65_536):
                    pass
        self.left.set()


@pytest.mark.parametrize("is_answered", [False, True], ids=["silent", "answered meanwhile"])
async def test_a_caller_that_is_stopped_in_the_handshake_hangs_up_and_nothing_is_logged(
    tmp_path: Path, is_answered: bool
) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    with SlowTlsServer(tmp_path) as server:
        address = Address(HOST.identity.peer_id, server.endpoint)
        opening = asyncio.create_task(TRAINER.caller().open(address, WAIT_S))
        assert await asyncio.to_thread(server.greeted.wait, WAIT_S)
        if is_answered:  # while this loop waits, so that it learns of the answer and of the stop at once
            server.go.set()
            assert server.answered.wait(WAIT_S)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        server.go.set()
        assert await asyncio.to_thread(server.left.wait, WAIT_S)
        gc.collect()  # a task or a future whose error nobody has asked for says so then
        await asyncio.sleep(0)
    assert problems == []


async def test_a_port_that_hangs_up_in_the_handshake_cannot_be_reached() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        endpoint = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(NotConnectedError, match=f"{endpoint} cannot be reached: Connection reset by peer"):
            await TRAINER.caller().open(Address(HOST.identity.peer_id, endpoint), WAIT_S)

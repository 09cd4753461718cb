"""Whom a node talks to: gRPC channels pinned to a peer's key, calls signed with one's own.

A peer's certificate is fetched from its port, must prove the peer id that the directory names, and is then the only one
that the channel takes. In `insecure_local` calls are plain and unsigned, and stay on this machine.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import grpc

from common.errors import ConfigError, DeadlineError, IdentityError, UnavailableError
from protocol.admission import OPEN, Admission
from protocol.call_signature import CallChecker, CallSigner
from protocol.certificate import certificate_of, host_name, pem_of, proven_peer_id
from protocol.endpoints import Address, is_loopback, is_relayed, relays_of
from protocol.limits import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.identity import Identity

KEEPALIVE_MS = 10_000
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A host that comes back on the same endpoint is tried again soon.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A machine that sleeps, or a relay that is killed, closes nothing: its silence is noticed while calls wait.
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 2),
    ("grpc.use_local_subchannel_pool", 1),
    # A name is looked up again when a connection to it fails.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    # A proxy of the environment is for the web: it cannot reach peers, and none of them is behind it.
    ("grpc.enable_http_proxy", 0),
)


READ_BYTES = 16_384


class NotConnectedError(UnavailableError):
    """No connection was made: the peer has seen nothing of the call."""


class TunnelSource(Protocol):
    """Ways to nodes that this one cannot dial."""

    async def endpoint(self, peer_id: str, relays: tuple[str, ...]) -> str:
        """Where on this machine a connection leads to that node's server; raises UnavailableError."""


@dataclass(frozen=True)
class Security:
    """How this node proves itself and checks others, in a closed run (`admission`) also that they take part.

    `tunnels` lead to those that it cannot dial.
    """

    identity: Identity
    insecure_local: bool = False
    tunnels: TunnelSource | None = None
    admission: Admission = OPEN
    clock: Callable[[], float] = time.time

    def check_listen(self, address: str) -> None:
        """Raise ConfigError for an address that a node without encryption must not listen on."""
        if self.insecure_local and not is_loopback(address):
            raise ConfigError(f"insecure_local: only with --listen 127.0.0.1 or ::1, is {address}")

    def caller(self) -> Caller:
        """Return what opens channels and signs calls for this node."""
        return Caller(self)

    def checker(self) -> CallChecker | None:
        """Return what checks the calls that this node gets; None where none is checked."""
        return None if self.insecure_local else CallChecker(self.identity.peer_id, self.clock, self.admission)

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """Return credentials with a fresh certificate; None where calls are plain."""
        if self.insecure_local:
            return None
        certificate = certificate_of(self.identity, self.clock())
        return grpc.ssl_server_credentials([(certificate.key, certificate.chain)])


class Caller:
    """Opens channels, and signs calls."""

    def __init__(self, security: Security) -> None:
        self._insecure_local, self._tunnels = security.insecure_local, security.tunnels
        self._clock = security.clock
        self._signer = CallSigner(security.identity, security.clock, security.admission)

    async def open(self, address: Address, timeout_s: float) -> grpc.aio.Channel:
        """A channel that takes nobody but this peer.

        Raises:
            NotConnectedError: it does not answer, does not speak TLS, or proves to be somebody else.
            DeadlineError: it does not answer in time.
        """
        if self._insecure_local:
            return _plain_channel(address)
        dialled = Address(address.peer_id, await self._dialled(address))
        pem = await _proven_certificate(dialled, timeout_s, self._clock)
        pinned = grpc.ssl_channel_credentials(root_certificates=pem)
        name = ("grpc.ssl_target_name_override", host_name(address.peer_id))
        return grpc.aio.secure_channel(dialled.endpoint, pinned, options=(*OPTIONS, name))

    async def _dialled(self, address: Address) -> str:
        """host:port to connect to."""
        if not is_relayed(address.endpoint):
            return address.endpoint
        if self._tunnels is None:
            raise NotConnectedError(f"{address.peer_id} is reached through relays, and this node has no tunnels")
        try:
            return await self._tunnels.endpoint(address.peer_id, relays_of(address.endpoint))
        except UnavailableError as error:
            raise NotConnectedError(str(error)) from None

    def metadata(self, address: Address, method: str) -> tuple[tuple[str, bytes], ...]:
        """Return the metadata to send with one call of `method`."""
        return () if self._insecure_local else self._signer.metadata(address.peer_id, method)


def _plain_channel(address: Address) -> grpc.aio.Channel:
    if is_relayed(address.endpoint) or not is_loopback(_host_and_port(address.endpoint)[0]):
        raise NotConnectedError(f"{address.endpoint}: insecure_local calls this machine only")
    return grpc.aio.insecure_channel(address.endpoint, options=OPTIONS)


async def _proven_certificate(address: Address, timeout_s: float, clock: Callable[[], float]) -> bytes:
    try:
        async with asyncio.timeout(timeout_s):
            der = await _certificate_at(address.endpoint)
    except TimeoutError:
        raise DeadlineError(f"{address.endpoint} did not show its certificate in {timeout_s:.1f} s") from None
    except ssl.SSLError as error:
        raise NotConnectedError(f"{address.endpoint} does not speak TLS: {error.reason or error}") from None
    except OSError as error:
        raise NotConnectedError(f"{address.endpoint} cannot be reached: {error.strerror or error}") from None
    try:
        found = proven_peer_id(der, clock())
    except IdentityError as error:
        raise NotConnectedError(f"{address.endpoint}: {error}") from None
    if found != address.peer_id:
        raise NotConnectedError(f"{address.endpoint} proves to be {found}, not {address.peer_id}")
    return pem_of(der)


async def _certificate_at(endpoint: str) -> bytes:
    """What a server shows in a handshake that is ours and not the event loop's.

    uvloop's, cancelled when the server has just answered, leaves the connection open, or logs that it is closed.
    """
    host, port = _host_and_port(endpoint)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        return await _shown_certificate(reader, writer, host)
    finally:
        writer.transport.abort()


async def _shown_certificate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> bytes:
    """The certificate in DER, empty without one. How much a server may say before that, OpenSSL bounds."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = _any_certificate().wrap_bio(incoming, outgoing, server_hostname=host)
    while not _is_agreed(tls):
        writer.write(outgoing.read())
        await writer.drain()
        piece = await reader.read(READ_BYTES)
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        incoming.write(piece)
    writer.write(outgoing.read())
    await writer.drain()
    return tls.getpeercert(binary_form=True) or b""


def _is_agreed(tls: ssl.SSLObject) -> bool:
    """Go on with a handshake; whether it is done, or waits for more of the server's."""
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _any_certificate() -> ssl.SSLContext:
    """Takes whatever the server shows: what it proves is checked afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return context


def _host_and_port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)

"""`health`: asks the node of a folder on this machine whether it serves. Light, since containers ask every few seconds.

A host or a trainer says in `server.json` where its gRPC server is and is asked over gRPC, like any peer: pinned to its
key, signed, with the standard health service. A coordinator has no gRPC server; its DHT node must greet.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import psutil
from grpc_health.v1 import health_pb2

from common.atomic_file import write_atomically
from common.errors import ConfigError, IdentityError, UnavailableError
from common.settings import check_minimums
from common.text import moment_text, peer_words
from node.limits.availability_file import read_availability
from protocol.admission import OPEN, Admission, token_from_hex
from protocol.endpoints import Address
from protocol.identity import Identity, public_key_of
from protocol.security import Security
from protocol.status import MAX_MESSAGE_CHARS, REASON_KEY
from protocol.swarm_file import LISTENING_FILE, SwarmFile, checked_run_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from node.limits.events import AvailabilityEvent
    from node.rpc.config import HealthConfig

    Check = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

logger = logging.getLogger(__name__)

SERVER_FILE, SWARM_FILE = "server.json", "swarm.toml"
MAX_FILE_BYTES, MAX_PORT = 4096, 65_535
CHECK = "/grpc.health.v1.Health/Check"
GREETING = b"\x13/multistream/1.0.0\n"
"""What both sides of a libp2p connection say first."""


@contextmanager
def server_told(folder: Path, address: Address, *, obeys: bool = False, admission: Admission = OPEN) -> Iterator[None]:
    """Say in `folder` where this node's server is, while the context lasts. A full disk is reported, no more.

    A node that `obeys` signals also says which process it is. One of a closed run answers only who has the token.
    """
    path = folder / SERVER_FILE
    process = {"pid": os.getpid(), "started_s": psutil.Process().create_time()} if obeys else {}
    token = {"run_id": admission.run_id, "admission": admission.token.hex()} if admission.closed else {}
    told = json.dumps({**address._asdict(), **process, **token})
    try:
        write_atomically(path, f"{told}\n".encode(), mode=0o600 if token else 0o644)
    except OSError as error:
        logger.warning("%s: cannot be written, so `health` will not find this node: %s", path, error.strerror)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


async def run_health(config: HealthConfig, _stop: asyncio.Event) -> None:
    """Print who serves where, and why a host does not work now.

    Raises UnavailableError if nobody serves, ConfigError for a damaged file.
    """
    check_minimums(config, {"timeout_s": 0.1})
    try:
        async with asyncio.timeout(config.timeout_s):
            said = await _ask(config)
    except TimeoutError:
        raise UnavailableError(f"{config.state}: its node did not answer within {config.timeout_s:g} s") from None
    told = read_availability(config.state)
    sys.stdout.write("\n".join((said, *(_lines_of(told) if told else ()), "")))


def _lines_of(told: AvailabilityEvent) -> Iterator[str]:
    """Why a host does not work, and what it cannot know. It is well all the same."""
    for reason in told.reasons:
        until = "" if reason.until_s is None else f" until {moment_text(reason.until_s)}"
        yield f"paused since {moment_text(reason.since_s)}{until}: {reason.why}"
    yield from told.unknown


async def _ask(config: HealthConfig) -> str:
    server, swarm = config.state / SERVER_FILE, config.state / SWARM_FILE
    if server.exists():
        return await _ask_server(read_server(server), read_admission(server), config)
    if (listening := config.state / LISTENING_FILE).exists():
        return await _ask_dht(*read_listening(listening))
    if swarm.exists():
        return await _ask_dht(*read_dht(swarm))
    raise UnavailableError(f"{config.state}: no node serves from this folder")


def read_server(path: Path) -> Address:
    """What a node wrote; raises ConfigError naming file and field."""
    fields = _read_fields(path)
    if not all(isinstance(fields.get(name), str) for name in Address._fields):
        raise ConfigError(f"{path}: must have {' and '.join(Address._fields)}, both text")
    host, _, port = fields["endpoint"].rpartition(":")
    _check_port(path, host, port)
    try:
        public_key_of(fields["peer_id"])
    except IdentityError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Address(fields["peer_id"], fields["endpoint"])


def read_admission(path: Path) -> Admission:
    """The run that a node wrote that it is in, if that is closed; raises ConfigError naming file and field."""
    fields = _read_fields(path)
    if "admission" not in fields:
        return OPEN
    try:
        return Admission(checked_run_id(fields.get("run_id")), token_from_hex(fields["admission"]))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(MAX_FILE_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return fields if isinstance(fields, dict) else {}


def read_listening(path: Path) -> tuple[str, int]:
    """Where the DHT node of a coordinator or lighthouse listens on this machine; raises ConfigError naming the file."""
    fields = _read_fields(path)
    host, port = str(fields.get("host", "")), str(fields.get("port", ""))
    _check_port(path, host, port)
    return host, int(port)


def read_dht(path: Path) -> tuple[str, int]:
    """Where the DHT node listens that a coordinator wrote first; raises ConfigError naming the file."""
    _, _, host, _, port, *_ = (*SwarmFile.read(path).initial_peers[0].split("/"), "", "", "")
    _check_port(path, host, port)
    return host, int(port)


def _check_port(path: Path, host: str, port: str) -> None:
    if not host or not (port.isascii() and port.isdecimal() and int(port) <= MAX_PORT):
        raise ConfigError(f"{path}: must name an address and a port up to {MAX_PORT}, has {host[:60]!r}, {port[:60]!r}")


async def _ask_server(address: Address, admission: Admission, config: HealthConfig) -> str:
    caller = Security(Identity.generate(), config.insecure_local, admission=admission).caller()
    async with await caller.open(address, config.timeout_s) as channel:
        try:
            check: Check = channel.unary_unary(CHECK)
            call = check(b"", metadata=caller.metadata(address, CHECK), timeout=config.timeout_s)
            raw, trailing = await call, await call.trailing_metadata()
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(f"{address.endpoint}: {error.details()}") from None
    answer = health_pb2.HealthCheckResponse.FromString(raw)
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        why = peer_words(str(dict(trailing or ()).get(REASON_KEY, "it is leaving")), MAX_MESSAGE_CHARS)
        raise UnavailableError(f"{address.endpoint}: is {status}: {why}")
    return f"{address.peer_id} at {address.endpoint}: {status}"


async def _ask_dht(host: str, port: int) -> str:
    """Connect to a DHT node and wait for its first words."""
    where = f"{host} port {port}"
    try:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(GREETING)
            greeting = await reader.readexactly(len(GREETING))
        finally:
            writer.transport.abort()
    except (OSError, asyncio.IncompleteReadError) as error:
        raise UnavailableError(f"{where}: its DHT node does not answer: {error}") from None
    if greeting != GREETING:
        raise UnavailableError(f"{where}: what answers is no DHT node")
    return f"{where}: the DHT node answers"

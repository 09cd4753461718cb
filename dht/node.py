"""One node's place in the DHT: hivemind's Kademlia in the caller's event loop, behind calls that are bounded in time.

Records are stored by the few peers nearest to their key and vanish when they expire. Nothing on the path of a step
waits for this file: a trainer reads the directory, which is refreshed from here in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from hivemind.dht import node as hivemind_node
from hivemind.dht import protocol as hivemind_protocol
from hivemind.dht import routing as hivemind_routing
from hivemind.dht.node import DHTNode
from hivemind.utils import timed_storage
from hivemind.utils.logging import use_hivemind_log_handler

from common.clock import SteadyClock
from common.errors import UnavailableError
from dht.answers import node_id_of
from dht.bootstrap import Bootstrap, InitialPeer, parse_initial_peer
from dht.bounded_calls import BoundedCalls
from dht.clock_watch import ClockWatch
from dht.daemon import Daemon, DaemonAddresses, check_still_free, daemon_addresses
from dht.lookup import Lookup
from dht.packing import RecordChecker
from dht.peer_memory import PeerMemory
from dht.record_store import Entry
from dht.streams import Streams
from dht.supervisor import DaemonSupervisor
from dht.transport import Transport
from dht.validator import RecordValidator
from protocol.admission import OPEN, Admission
from protocol.endpoints import is_relay_address

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from protocol.identity import Identity
    from protocol.manifest import Manifest

T = TypeVar("T")

logger = logging.getLogger(__name__)

N_REPLICAS = 5
"""Peers that store each record."""

N_ASKED = 8
"""Peers that are asked for each key: more than store it, since peers come and go between a store and a lookup."""

CALL_TIMEOUT_S = 3.0
"""How long one call to one peer may take."""

CANCEL_TRIES = 2
STEP_TIMEOUT_S = 1.5
"""How long one step of starting or stopping may take that waits for p2pd on this machine only."""

REJOIN_TIMEOUT_S = 8.0
"""How long meeting the others again may take after a restart of p2pd."""

MAX_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class DhtConfig:
    """One node's part of the DHT. `port` 0 takes any; `clock` gives seconds since 1970.

    `announce`: the IP address at which others reach `port`, if it is not `host`. In a closed run (`admission`) it
    neither stores nor finds records of those who do not take part. `peers_file` is where it remembers its peers.
    """

    identity: Identity
    initial_peers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    announce: str = ""
    start_timeout_s: float = 15.0
    request_timeout_s: float = 10.0
    refresh_period_s: float = 10.0
    keep_period_s: float = 30.0
    clock: Callable[[], float] = field(default_factory=SteadyClock)
    admission: Admission = OPEN
    peers_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What `start` builds, from the outside in, and `stop` takes down. `daemon` is the first; others may follow it."""

    daemon: Daemon
    transport: Transport
    node: DHTNode
    membership: Bootstrap
    validator: RecordValidator
    calls: BoundedCalls


class DhtNode:
    """A member of the DHT that stores records for others; made by `start`, ended by `stop`."""

    def __init__(self, config: DhtConfig, parts: _Parts, addresses: tuple[str, ...], place: DaemonAddresses) -> None:
        self._config = config
        self._parts = parts
        self._kept: dict[tuple[str, str], Entry] = {}
        self._stopped = False
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self.peer_id = config.identity.peer_id
        self.addresses = tuple(address for address in addresses if "/tcp/" in address)
        self.udp_address = place.udp
        self.streams = Streams(parts.transport)
        self._place = place.with_port_of(self.addresses[0])
        self._supervisor = DaemonSupervisor(parts.daemon, start=self._start_daemon, take_over=self._take_over)
        self._on_restart: list[Callable[[], object]] = []
        self._on_lost: list[Callable[[], object]] = []
        self._lost: UnavailableError | None = None
        self._rejoining = False

    @classmethod
    async def start(cls, config: DhtConfig) -> DhtNode:
        """Start p2pd, which is started again whenever it dies, and join the DHT.

        Raises:
            ConfigError: an initial peer, the host or the port is not one.
            UnavailableError: the port is taken, p2pd does not start, or no initial peer answers.
        """
        initial_peers = tuple(parse_initial_peer(text) for text in config.initial_peers)
        place = await asyncio.to_thread(daemon_addresses, config.host, config.port, config.announce)
        quiet_hivemind()
        _give_hivemind(config.clock)
        async with contextlib.AsyncExitStack() as undo:
            parts = await _build(config, initial_peers, place, undo)
            await parts.membership.join(config.start_timeout_s)
            found = await parts.calls.within(STEP_TIMEOUT_S, lambda: parts.transport.get_visible_maddrs(latest=True))
            addresses = tuple(str(address) for address in found)
            undo.pop_all()
        started = cls(config, parts, addresses, place)
        started._tasks = (
            asyncio.create_task(started._keep_daemon_alive(), name="p2pd supervisor"),
            asyncio.create_task(started._refresh_forever(), name="dht refresh"),
            asyncio.create_task(started._keep_forever(), name="dht keep"),
            asyncio.create_task(started._watch_clock(), name="clock"),
        )
        return started

    @property
    def relay_address(self) -> str:
        """Where it is dialled as a relay: over QUIC, if it takes that; empty if only a name is known."""
        address = self.udp_address or self.addresses[0].partition("/p2p/")[0]
        return address if is_relay_address(address) else ""

    @property
    def listening(self) -> tuple[str, int]:
        """Host and port where it listens on this machine, which may not be what others dial."""
        _, _, host, _, port, *_ = self._place.listen[0].split("/")
        return host, int(port)

    @property
    def known_peers(self) -> int:
        """Peers in this node's routing table."""
        return self._parts.membership.known_peers

    @property
    def daemon_pid(self) -> int:
        """Process id of this node's p2pd, another one after each restart."""
        return self._supervisor.daemon.pid

    def on_restart(self, callback: Callable[[], object]) -> None:
        """Call `callback` each time after p2pd was started again and has met the others."""
        self._on_restart.append(callback)

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Call `callback` when p2pd cannot be started again; `raise_if_lost` says why."""
        self._on_lost.append(callback)
        if self._lost is not None:
            callback()

    def raise_if_lost(self) -> None:
        """Raise UnavailableError if p2pd has ended and cannot be started again."""
        if self._lost is not None:
            raise self._lost

    def now_s(self) -> float:
        """The time that expirations are compared with."""
        return self._config.clock()

    def serve_only(self, manifest: Manifest) -> None:
        """Store only records of this run from now on, so that strangers' runs cannot fill this node."""
        self._parts.validator.serve_only(manifest)

    async def store(self, key: str, value_raw: bytes, expiration_s: float, subkey: str) -> bool:
        """Store one signed record; whether some peer took it. Raises UnavailableError."""
        (taken,) = await self.store_many([Entry(key, subkey, value_raw, expiration_s)])
        return taken

    async def store_many(self, entries: Sequence[Entry]) -> tuple[bool, ...]:
        """Store signed records; for each, whether some peer took it. Raises UnavailableError.

        A record is refused that `open_record` refuses, or that expires no later than the one that is already there.
        """
        if not entries:
            return ()
        keys, subkeys, values, expirations = zip(*entries, strict=True)
        node, times = self._parts.node, list(map(float, expirations))
        taken = await self._bounded(lambda: node.store_many(list(keys), list(values), times, subkeys=list(subkeys)))
        return tuple(bool(taken[key, subkey]) for key, subkey in zip(keys, subkeys, strict=True))

    async def get_many(self, keys: Sequence[str]) -> dict[str, dict[str, bytes]]:
        """Records under each key, by sub-key; of each, the one that expires last. Raises UnavailableError.

        A key that could not be looked up in time is left out; one that was, and is not there, maps to nothing.
        """
        if not keys:
            return {}
        lookup = Lookup(self._parts.node, keys, N_ASKED)
        try:
            await self._bounded(lookup.run)
        except UnavailableError:
            self._check_running()
            if not lookup.found:
                raise
        return dict(lookup.found)

    def keep(self, entry: Entry) -> None:
        """Store this record again every `keep_period_s`, for as long as it lives: peers that hold it now may leave."""
        if len(self._kept) >= MAX_KEPT and (entry.key, entry.subkey) not in self._kept:
            raise UnavailableError(f"dht: already keeps {MAX_KEPT} records")
        self._kept[entry.key, entry.subkey] = entry

    async def stop(self) -> None:
        """Leave; no process, thread, task or file stays. Takes 10 ms, at worst a few seconds; safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        left = set(self._tasks)
        for _ in range(CANCEL_TRIES):  # a library may swallow a cancellation
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=STEP_TIMEOUT_S) if left else (left, left)
        await self.streams.close()
        self._parts.node.is_alive = False
        await self._parts.transport.close()
        await self._supervisor.daemon.stop()
        await self._parts.calls.drain(STEP_TIMEOUT_S)

    async def _bounded(self, call: Callable[[], Awaitable[T]]) -> T:
        self._check_running()
        daemon = self._supervisor.daemon
        result = await self._parts.calls.within(self._config.request_timeout_s, call)
        self._check_running()  # a node that stopped meanwhile got no answers, which is not the same as no records
        if daemon is not self._supervisor.daemon:
            raise UnavailableError("dht: p2pd ended during the call and was started again; repeat the call")
        return result

    def _check_running(self) -> None:
        if self._stopped:
            raise UnavailableError("dht: this node has stopped")
        self.raise_if_lost()
        if (code := self._supervisor.daemon.exit_code) is not None:
            raise UnavailableError(f"dht: p2pd has ended with exit code {code} and is being started again")
        if self._rejoining:  # a call now would find nobody, and make hivemind forget everybody
            raise UnavailableError("dht: p2pd was started again and has not met the others yet")

    async def _keep_daemon_alive(self) -> None:
        try:
            while not self._stopped:
                await self._supervisor.restarted()
                await self._resume()
        except UnavailableError as error:
            self._lost = error
            logger.error("%s", error)  # noqa: TRY400 - a sentence says it all
            for callback in self._on_lost:
                callback()

    async def _start_daemon(self) -> Daemon:
        check_still_free(self._place)
        return await Daemon.spawn(self._config.identity, self._place, self._config.start_timeout_s)

    async def _take_over(self, daemon: Daemon) -> None:
        await self._parts.calls.within(STEP_TIMEOUT_S, lambda: self._parts.transport.take_over(daemon))
        self._rejoining = True

    async def _resume(self) -> None:
        """Meet the others, give them back what this node keeps, and tell those who have more to say."""
        with contextlib.suppress(UnavailableError):  # p2pd may have died again, or nobody answers: a refresh follows
            await self._parts.calls.within(REJOIN_TIMEOUT_S, self._parts.membership.rejoin)
        self._rejoining = False
        for callback in self._on_restart:
            callback()
        with contextlib.suppress(UnavailableError):
            await self._store_kept()

    async def _watch_clock(self) -> None:
        if isinstance(self._config.clock, SteadyClock):
            await ClockWatch(self._config.clock, self._parts.membership.peers_clocks).watch()

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.refresh_period_s)
            with contextlib.suppress(UnavailableError):
                await self._bounded(self._parts.membership.refresh)

    async def _keep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.keep_period_s)
            with contextlib.suppress(UnavailableError):
                await self._store_kept()

    async def _store_kept(self) -> None:
        self._kept = {name: entry for name, entry in self._kept.items() if entry.expiration_s > self.now_s()}
        await self.store_many(list(self._kept.values()))


def quiet_hivemind() -> None:
    """Send hivemind's log through ours and drop its chatter; HIVEMIND_LOGLEVEL=DEBUG brings it back."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(os.environ.get("HIVEMIND_LOGLEVEL", "ERROR"))


def _give_hivemind(clock: Callable[[], float]) -> None:
    """Hivemind compares expirations with a time of the whole process, which must not jump either."""
    if isinstance(clock, SteadyClock):
        for module in (timed_storage, hivemind_node, hivemind_protocol, hivemind_routing):
            module.get_dht_time = clock


async def _build(
    config: DhtConfig, initial_peers: tuple[InitialPeer, ...], place: DaemonAddresses, undo: contextlib.AsyncExitStack
) -> _Parts:
    checker, calls = RecordChecker(config.clock, config.admission), BoundedCalls()
    validator = RecordValidator(checker)
    daemon = await Daemon.spawn(config.identity, place, config.start_timeout_s)
    undo.push_async_callback(calls.drain, STEP_TIMEOUT_S)
    undo.push_async_callback(daemon.stop)
    transport = await calls.within(STEP_TIMEOUT_S, lambda: Transport.connect_to(daemon, checker, config.clock))
    undo.push_async_callback(transport.close)
    node = await calls.within(STEP_TIMEOUT_S, lambda: _join_nothing(transport, validator))
    transport.attach(node.protocol.routing_table)
    validator.attach(node.protocol.storage)
    memory = PeerMemory(config.peers_file, config.admission.run_id)
    membership = Bootstrap(node=node, transport=transport, initial_peers=initial_peers, calls=calls, memory=memory)
    return _Parts(
        daemon=daemon, transport=transport, node=node, membership=membership, validator=validator, calls=calls
    )


async def _join_nothing(transport: Transport, validator: RecordValidator) -> DHTNode:
    """A DHT of one. Its caches are off: a cached record would keep a dead replica alive and hide a new version."""
    return await DHTNode.create(
        p2p=transport,
        node_id=node_id_of(transport.peer_id),
        num_replicas=N_REPLICAS,
        wait_timeout=CALL_TIMEOUT_S,
        record_validator=validator,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,
    )

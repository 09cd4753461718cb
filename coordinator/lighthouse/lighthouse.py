"""Composition root of a lighthouse: first peer of a run, member of its DHT, relay and observer, in one trio process.

It holds nothing that a run cannot lose. Two or more can serve one run; a node knows them by their addresses. Started
again in the same folder it has the same peer id and the same port.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import trio
from rich.console import Console
from rich.text import Text

from common.config import EVENT_LOG_MINIMUMS
from common.events import EventLog
from common.folders import NODE_LOCK, SWARM_LOCK, FolderClaim, claimed
from common.metrics import serve_metrics
from common.program import program_name
from common.settings import check_minimums
from coordinator.events import PeerLeaveEvent, PeerStartEvent
from coordinator.lighthouse.announcer import LighthouseAnnouncer
from coordinator.lighthouse.kademlia import Kademlia
from coordinator.lighthouse.listen_addresses import announced, initial_members, listen
from coordinator.lighthouse.member import Member
from coordinator.lighthouse.metrics import Figures, LighthouseCollector
from coordinator.lighthouse.node_relay import NodeRelay
from coordinator.lighthouse.observer import OBSERVE_S, Observer
from coordinator.lighthouse.relay import CircuitRelay
from coordinator.lighthouse.repeating import repeat
from coordinator.lighthouse.rpc import DhtCalls
from coordinator.lighthouse.store import StoredRecords
from coordinator.lighthouse.transport import TrioTransport, quiet_libp2p
from dht.relay.quotas import MAX_CIRCUITS_PER_PEER, RelayLimits, RelayQuotas
from dht.swarm_config import resolve
from protocol.announcements import PeerRecord
from protocol.identity import Identity
from protocol.swarm_file import SwarmFile, listening_told
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    from coordinator.lighthouse.config import LighthouseConfig
    from protocol.admission import Admission
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

MINIMUMS = {
    "max_connections": 1,
    "max_reservations": 0,
    "max_circuits": 0,
    "max_circuit_mb": 1,
    "max_circuit_s": 1,
    "metrics_port": 0,
    **EVENT_LOG_MINIMUMS,
}
MEGABYTE = 1 << 20


class Lighthouse:
    """The parts, wired."""

    def __init__(self, config: LighthouseConfig, identity: Identity, address: str) -> None:
        admission, initial_peers = resolve(config)
        self._store = StoredRecords(admission, time.time)
        self._quotas = RelayQuotas[bytes](_relay_limits(config), time.time)
        self.transport = TrioTransport(identity, [address], config.max_connections)
        self._calls = DhtCalls(self.transport)
        self._relay = CircuitRelay(self.transport, self._quotas)
        NodeRelay(self.transport, self._quotas)
        self._kademlia = Kademlia(self.transport, self._relay)
        initial = initial_members(initial_peers)
        self._member = Member(self.transport, self._calls, self._kademlia, self._store, initial, time.time)
        said = _described(config, address)
        self._announcer = LighthouseAnnouncer(self._member, identity, admission, said, time.time)
        self._observer = Observer(self._member, admission, time.time, self._serve_only)

    async def work(self) -> None:
        """Join, stay a member, and look at the run from time to time, for ever."""
        await self._member.refresh()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._member.run)
            nursery.start_soon(self._announcer.run)
            nursery.start_soon(self._observe_forever)

    async def leave(self) -> None:
        """Tell the run; bounded in time."""
        await self._announcer.withdraw()

    def figures(self) -> Figures:
        """What it does now; safe in any thread."""
        return Figures(
            run=self._observer.view,
            calls={**self._calls.served, "kademlia": self._kademlia.served},
            connections=len(self.transport.connected),
            members=len(self._member.table),
            records=self._store.n_records,
            reservations=self._quotas.n_reservations,
            circuits=self._quotas.n_circuits,
            relayed_bytes=self._quotas.relayed_bytes,
            refused=self._calls.refused + self._quotas.refused + self.transport.refused,
        )

    def _serve_only(self, manifest: Manifest) -> None:
        self._store.serve_only(manifest.model)

    async def _observe_forever(self) -> None:
        await repeat(self._observe, OBSERVE_S, at_once=True)

    async def _observe(self) -> None:
        await self._observer.observe()
        self._relay.forget_the_gone()


async def serve(config: LighthouseConfig, stop: trio.Event) -> None:
    """Serve a run until `stop`."""
    check_minimums(config, MINIMUMS)
    quiet_libp2p()
    admission, initial_peers = resolve(config)
    with ExitStack() as stack:
        for lock in (NODE_LOCK, SWARM_LOCK):
            stack.enter_context(claimed(FolderClaim(folder=config.state, role="lighthouse", flag="--state", lock=lock)))
        await _serve(config, admission, initial_peers, stop)


async def _serve(
    config: LighthouseConfig, admission: Admission, initial_peers: tuple[str, ...], stop: trio.Event
) -> None:
    identity = Identity.load_or_create(config.state / "identity.key")
    listener = await listen(config, initial_peers)
    address = announced(listener, config.announce, identity.peer_id)
    lighthouse = Lighthouse(config, identity, address)
    collector = LighthouseCollector(lighthouse.figures)
    with ExitStack() as stack:
        stack.enter_context(serve_metrics(collector, config.metrics_listen, config.metrics_port))
        stack.enter_context(listening_told(config.state, *listener.socket.getsockname()[:2]))
        log, max_bytes = config.state / "events.jsonl", config.event_log_bytes
        events = EventLog(log, max_bytes=max_bytes, n_files=config.event_log_files)
        stack.callback(events.close)
        async with lighthouse.transport.running([listener]):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lighthouse.work)
                _tell(config, admission, address, initial_peers)
                events.emit(PeerStartEvent(run_id=admission.run_id, peer_id=identity.peer_id, addresses=(address,)))
                await stop.wait()
                nursery.cancel_scope.cancel()
            await lighthouse.leave()
        events.emit(PeerLeaveEvent())


def _tell(config: LighthouseConfig, admission: Admission, address: str, initial_peers: tuple[str, ...]) -> None:
    """Write and print how others use this lighthouse."""
    path = config.state / "swarm.toml"
    others = [peer for peer in initial_peers if peer != address]
    run_id, initial_peers = admission.run_id, (address, *others)
    SwarmFile(run_id=run_id, initial_peers=initial_peers, admission=admission.token).write(path)
    text = Text.assemble("lighthouse of run ", (run_id, "bold"), f" is up at {address}\n\n")
    for purpose, command in (
        ("join through it", f"host --join {path}"),
        ("put it in the invite", f"coordinator --initial-peers {address}"),
    ):
        text.append(f"  {purpose:<22}").append(f"{program_name()} {command}\n", style="cyan")
    Console().print(text, soft_wrap=True)


def _described(config: LighthouseConfig, address: str) -> PeerRecord:
    """What others are told in the run's directory."""
    relays = config.max_reservations and config.max_circuits
    relay = address.partition("/p2p/")[0] if relays else ""
    return PeerRecord(role="lighthouse", software=SOFTWARE, started_s=time.time(), relay=relay)


def _relay_limits(config: LighthouseConfig) -> RelayLimits:
    return RelayLimits(
        max_reservations=config.max_reservations,
        max_circuits=config.max_circuits,
        max_circuits_per_target=MAX_CIRCUITS_PER_PEER,
        circuit_bytes=config.max_circuit_mb * MEGABYTE,
        circuit_s=config.max_circuit_s,
        reservations_setting="--max-reservations",
        circuits_setting="--max-circuits",
        caller_setting="",
    )

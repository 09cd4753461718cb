"""Which peer holds which block, right now, from memory: the third station on the path of a step.

A background task looks all of a run's keys up in one go and swaps in a new immutable view; trainers' threads read it
without a lock. A replica is live until its record expires, its owner withdraws it, or, for a while, after a caller
reported that its owner failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING

from common.errors import KilohiveError
from common.tasks import Periodic
from dht.record_cache import RecordCache
from dht.view import DirectoryView, PeerInfo, Replica, Reported
from protocol.announcements import BlockRecord, PeerRecord
from protocol.manifest import TRUNK, all_blocks
from protocol.records import block_key, peers_key, reports_key
from protocol.reports import TrainerReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dht.record_store import RecordStore
    from protocol.manifest import BlockId, ModelConfig
    from protocol.records import SignedRecord

logger = logging.getLogger(__name__)

REFRESH_S = 2.0
MAX_AVOID_S = 60.0
"""A peer is never avoided longer than this at a time: it may have come back at the same address."""


class Directory:
    """A run's replicas and peers. Reading and reporting are safe in any thread; the rest belongs to the event loop.

    `with_reports`: trainers' reports too, which only those look for who show them to people.
    """

    def __init__(
        self,
        dht: RecordStore,
        run_id: str,
        model: ModelConfig,
        refresh_s: float = REFRESH_S,
        *,
        with_reports: bool = False,
    ) -> None:
        self._dht = dht
        self._model = model
        shown = (reports_key(run_id),) if with_reports else ()
        self._keys = (peers_key(run_id), *(block_key(run_id, block) for block in (TRUNK, *all_blocks(model))), *shown)
        self._record_cache = RecordCache()
        self._known = DirectoryView(replicas=MappingProxyType(dict.fromkeys(all_blocks(model), ())))
        self._avoided: Mapping[str, float] = MappingProxyType({})
        self._usable: frozenset[tuple[BlockId, str, str, str]] = frozenset()
        self._generation = 0
        self._failing = False
        self._writing = threading.Lock()
        self._subscribers: list[Callable[[DirectoryView], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._refreshing = Periodic("directory refresh", refresh_s, self._refresh_or_log)

    async def start(self) -> None:
        """Look everything up, then again every `refresh_s` until `stop`. A DHT that does not answer is no error."""
        self._loop = asyncio.get_running_loop()
        await self._refresh_or_log()
        self._refreshing.start()

    async def stop(self) -> None:
        """End the background task; the last view stays readable."""
        await self._refreshing.stop()

    async def refresh_now(self) -> None:
        """Look all keys up and swap the new view in. Raises UnavailableError: what was known stays until it expires."""
        self._loop = asyncio.get_running_loop()
        try:
            self._record_cache.take(await self._dht.get_many(self._keys), self._dht.now_s())
        finally:
            self._swap_in(self._view_of_record_cache())

    @property
    def generation(self) -> int:
        """Grows when a replica appears, moves, vanishes, changes state, is avoided or no longer is; not with load."""
        return self._generation

    def replicas(self, block: BlockId) -> tuple[Replica, ...]:
        """Live, serving replicas of a block (or of `TRUNK`) whose peers are not avoided, ordered by peer id."""
        now_s, avoided, known = self._dht.now_s(), self._avoided, self._known
        return tuple(
            replica
            for replica in (known.trunk if block == TRUNK else known.replicas.get(block, ()))
            if replica.state == "serving"
            and replica.expiration_s > now_s
            and avoided.get(replica.peer_id, 0.0) <= now_s
        )

    def peers(self) -> tuple[PeerInfo, ...]:
        """Live peers of every role, ordered by peer id."""
        return self._known.at(self._dht.now_s()).peers

    @property
    def asks_for_tickets(self) -> bool:
        """Every peer of the run that is known shows one, so the run is closed. Read it in the event loop."""
        tickets = [
            record.ticket for record, said in self._record_cache.live(self._dht.now_s()) if isinstance(said, PeerRecord)
        ]
        return bool(tickets) and all(tickets)

    def snapshot(self, *, with_avoided: bool = False) -> DirectoryView:
        """What is live now; avoided peers' replicas only if asked for."""
        now_s = self._dht.now_s()
        if with_avoided:
            return self._known.at(now_s)
        return self._known.at(now_s).without(
            frozenset(peer_id for peer_id, until_s in self._avoided.items() if until_s > now_s)
        )

    def report_failure(self, peer_id: str, retry_after_s: float) -> None:
        """Hide a peer's replicas for `retry_after_s` seconds (at most MAX_AVOID_S)."""
        now_s = self._dht.now_s()
        self._avoid({peer_id: now_s + min(max(retry_after_s, 0.0), MAX_AVOID_S)}, now_s)

    def report_success(self, peer_id: str) -> None:
        """Show a peer's replicas again."""
        if peer_id in self._avoided:
            self._avoid({peer_id: 0.0}, self._dht.now_s())

    def subscribe(self, callback: Callable[[DirectoryView], None]) -> Callable[[], None]:
        """Call `callback` in the event loop with each new generation's view; returns how to end that."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    async def wait_for_change(self, timeout_s: float, *, since: int | None = None) -> bool:
        """Wait for a generation after `since` (default: the current one); False if none comes within `timeout_s`."""
        start = self._generation if since is None else since
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._generation == start:
                    await self._changed.wait()
        return self._generation != start

    async def _refresh_or_log(self) -> None:
        try:
            await self.refresh_now()
        except KilohiveError as error:
            level = logging.DEBUG if self._failing else logging.WARNING  # once, not every two seconds
            logger.log(level, "the directory is not up to date: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _view_of_record_cache(self) -> DirectoryView:
        now_s = self._dht.now_s()
        replicas: dict[BlockId, list[Replica]] = {block: [] for block in self._known.replicas}
        others: list[Replica] = []
        trunk: list[Replica] = []
        peers: list[PeerInfo] = []
        reports: list[Reported] = []
        for record, said in sorted(self._record_cache.live(now_s), key=lambda item: item[0].owner):
            if isinstance(said, PeerRecord):
                peers.append(_peer(record, said))
            elif isinstance(said, TrainerReport):
                reports.append(Reported(peer_id=record.owner, said=said, expiration_s=record.expiration_s))
            elif said.block == TRUNK:
                trunk.append(_replica(record, said))
            elif said.n_experts == len(self._model.block_experts(said.block.block)):
                (replicas[said.block] if said.state == "serving" else others).append(_replica(record, said))
        return DirectoryView(
            taken_s=now_s,
            replicas=MappingProxyType({block: tuple(found) for block, found in replicas.items()}),
            others=tuple(others),
            trunk=tuple(trunk),
            peers=tuple(peers),
            reports=tuple(reports),
        )

    def _swap_in(self, view: DirectoryView) -> None:
        with self._writing:
            self._known = view
            self._bump_if_changed()

    def _avoid(self, until_s: Mapping[str, float], now_s: float) -> None:
        with self._writing:
            merged = {**self._avoided, **until_s}
            self._avoided = MappingProxyType({peer_id: end_s for peer_id, end_s in merged.items() if end_s > now_s})
            self._bump_if_changed()

    def _bump_if_changed(self) -> None:
        """Called with the lock held, from any thread."""
        view = self.snapshot()
        found = (*(r for replicas in view.replicas.values() for r in replicas), *view.others, *view.trunk)
        usable = frozenset((r.block, r.peer_id, r.endpoint, r.state) for r in found)
        if usable != self._usable:
            self._usable = usable
            self._generation += 1
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        view = self.snapshot()
        for callback in tuple(self._subscribers):
            callback(view)


def _replica(record: SignedRecord, said: BlockRecord) -> Replica:
    return Replica(
        block=said.block,
        peer_id=record.owner,
        endpoint=said.endpoint,
        version=said.version,
        queue_tokens=said.queue_tokens,
        tokens_per_s=said.tokens_per_s,
        tokens_total=said.tokens_total,
        n_experts=said.n_experts,
        state=said.state,
        divergence=said.divergence,
        expiration_s=record.expiration_s,
    )


def _peer(record: SignedRecord, said: PeerRecord) -> PeerInfo:
    return PeerInfo(
        peer_id=record.owner,
        role=said.role,
        endpoint=said.endpoint,
        software=said.software,
        started_s=said.started_s,
        n_blocks=said.n_blocks,
        tokens_per_s=said.tokens_per_s,
        run_tokens=said.run_tokens,
        queue_tokens=said.queue_tokens,
        own_tokens=said.own_tokens,
        staleness=said.staleness,
        exchanged_bytes=said.exchanged_bytes,
        reachability=said.reachability,
        relay=said.relay,
        paused=said.paused,
        evaluators=said.evaluators,
        pause_cause=said.pause_cause,
        paused_since_s=said.paused_since_s,
        paused_until_s=said.paused_until_s,
        expiration_s=record.expiration_s,
    )

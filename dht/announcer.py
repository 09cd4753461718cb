"""Says in the DHT, again and again, what this node is and which blocks it hosts; at the end, that it no longer does."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import KilohiveError
from common.tasks import Periodic
from dht.record_signer import RecordSigner
from dht.record_versions import PERIOD_S, TTL_S, WITHDRAW_TIMEOUT_S, WITHDRAWN
from protocol.announcements import encode_block, encode_peer
from protocol.records import block_key, peers_key, reports_key
from protocol.reports import encode_report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dht.record_store import RecordStore
    from protocol.admission import Admission
    from protocol.announcements import BlockRecord, PeerRecord
    from protocol.identity import Identity
    from protocol.reports import TrainerReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What a node says about itself at one moment."""

    peer: PeerRecord
    blocks: tuple[BlockRecord, ...] = ()
    report: TrainerReport | None = None


class Announcer:
    """Announces `describe()` in a run every `period_s`; a record lives `ttl_s` seconds. Belongs to the event loop."""

    def __init__(
        self,
        dht: RecordStore,
        identity: Identity,
        admission: Admission,
        *,
        describe: Callable[[], Announcement],
        period_s: float = PERIOD_S,
        ttl_s: float = TTL_S,
    ) -> None:
        self._dht = dht
        self._run_id = admission.run_id
        self._describe = describe
        self._period_s = period_s
        self._ttl_s = ttl_s
        self._announced: set[str] = set()
        self._signer = RecordSigner(identity, admission, ttl_s)
        self._problem = ""
        self._one_at_a_time = asyncio.Lock()
        self._announcing = Periodic("announcer", period_s, self._announce_or_log)

    async def start(self) -> None:
        """Announce once, then again every `period_s` until `stop`. A DHT that does not answer is tried again."""
        await self._announce_or_log()
        self._announcing.start()

    def announce_soon(self) -> None:
        """Announce now instead of at the next period; nothing happens before `start` or after `stop`."""
        self._announcing.hurry()

    async def stop(self) -> None:
        """End the announcements; what was said expires by itself."""
        await self._announcing.stop()

    async def announce_now(self) -> bool:
        """Say it all now, and withdraw blocks that are no longer hosted; whether every record was taken by some peer.

        Raises:
            UnavailableError: the DHT did not answer.
        """
        async with self._one_at_a_time:
            payloads = self._payloads(self._describe())
            gone = dict.fromkeys(self._announced - payloads.keys(), WITHDRAWN)
            self._announced |= payloads.keys()
            taken = await self._store({**payloads, **gone})
            if taken:
                self._announced -= gone.keys()
            return taken

    async def withdraw(self) -> None:
        """Stop, and take back everything said, so that others drop this node at their next look; bounded in time."""
        await self.stop()
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(WITHDRAW_TIMEOUT_S):
                    await self._store(dict.fromkeys(self._announced, WITHDRAWN))
            except (KilohiveError, TimeoutError) as error:
                logger.warning("this node's records could not be withdrawn and expire in %g s: %r", self._ttl_s, error)
            self._announced.clear()

    def _payloads(self, announcement: Announcement) -> dict[str, bytes]:
        payloads = {block_key(self._run_id, block.block): encode_block(block) for block in announcement.blocks}
        payloads[peers_key(self._run_id)] = encode_peer(announcement.peer)
        if announcement.report is not None:
            payloads[reports_key(self._run_id)] = encode_report(announcement.report)
        return payloads

    async def _store(self, payloads: Mapping[str, bytes]) -> bool:
        return all(await self._dht.store_many(self._signer.sign(payloads, self._dht.now_s())))

    async def _announce_or_log(self) -> None:
        problem = ""
        try:
            if not await self.announce_now():
                problem = "no peer took some of its records"
        except KilohiveError as error:
            problem = str(error)
        if problem and problem != self._problem:  # once, not at every period
            logger.warning("this node could not announce itself: %s; trying again every %g s", problem, self._period_s)
        self._problem = problem

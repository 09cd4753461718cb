"""Says in the DHT that this lighthouse is there and where it relays, as `dht/announcer.py` does for nodes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from coordinator.lighthouse.repeating import repeat
from dht.packing import carried
from dht.record_signer import RecordSigner
from dht.record_versions import PERIOD_S, WITHDRAW_TIMEOUT_S, WITHDRAWN
from protocol.announcements import encode_peer
from protocol.records import peers_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coordinator.lighthouse.member import Member
    from protocol.admission import Admission
    from protocol.announcements import PeerRecord
    from protocol.identity import Identity

logger = logging.getLogger(__name__)


class LighthouseAnnouncer:
    """Announces one record every PERIOD_S; `clock` gives seconds since 1970."""

    def __init__(
        self, member: Member, identity: Identity, admission: Admission, said: PeerRecord, clock: Callable[[], float]
    ) -> None:
        self._member, self._clock = member, clock
        self._key, self._payload = peers_key(admission.run_id), encode_peer(said)
        self._signer = RecordSigner(identity, admission)
        self._told: Sequence[bytes] = ()

    async def run(self) -> None:
        """Announce again and again, forever."""
        await repeat(self._announce, PERIOD_S, at_once=True)

    async def withdraw(self) -> None:
        """Take back what was said, so that others drop this lighthouse at their next look; bounded in time."""
        with trio.move_on_after(WITHDRAW_TIMEOUT_S) as limit:
            await self._say(WITHDRAWN)
        if limit.cancelled_caught:
            logger.warning("this lighthouse's record could not be withdrawn everywhere and expires soon")

    async def _announce(self) -> None:
        self._told = await self._member.nearest_to(self._key)
        await self._say(self._payload)

    async def _say(self, payload: bytes) -> None:
        for entry in self._signer.sign({self._key: payload}, self._clock()):
            await self._member.store(carried(entry), self._told)

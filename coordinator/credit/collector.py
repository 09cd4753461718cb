"""Asks hosts and trainers for their receipts, checks each, and has the ledger take them in. Belongs to the event loop.

Nothing is believed that both sides have not signed. A peer that sends nonsense, or more than it may, is left until the
next time; what it sent before stays.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from common.errors import InvalidInputError, KilohiveError, StorageError
from common.tasks import within
from coordinator.credit.ledger import Checked
from protocol import receipts_pb2 as pb
from protocol.identity import public_key_of
from protocol.parsing import parse_message
from protocol.profile import open_profile
from protocol.receipts import (
    CREDIT_SERVICE,
    MAX_PAGE_BYTES,
    MAX_PAGE_RECEIPTS,
    STORE_BYTES,
    check_receipt,
    open_receipt,
    receipt_digest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from coordinator.credit.ledger import Ledger
    from coordinator.credit.members import RunMember
    from protocol.channels import Channels
    from protocol.endpoints import Address
    from protocol.profile import Profile

logger = logging.getLogger(__name__)

COLLECT: Final = f"/{CREDIT_SERVICE}/Collect"
CALL_TIMEOUT_S = 10.0
PEER_TIMEOUT_S = 120.0
MAX_PAGES = 100
"""What is asked of one peer at a time, 50,000 receipts; the rest waits for the next time. Its quota is 120 calls."""

MAX_REFUSED = 100
"""Receipts that do not hold, after which a peer is asked no more."""

MAX_AT_ONCE = 4
"""Peers that are asked at once: gRPC holds a message of each, of up to MAX_MESSAGE_BYTES, before its size is seen."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One collection: peers that were `asked` and that have `answered`, receipts that were `new` and `refused`."""

    asked: int
    answered: int
    new: int
    refused: int


class _Visit(NamedTuple):
    """What came of one peer."""

    answered: bool
    new: int
    refused: int


class Collector:
    """Collects the receipts of run `run_id`; `clock` gives seconds since 1970."""

    def __init__(self, run_id: str, ledger: Ledger, channels: Channels, clock: Callable[[], float]) -> None:
        self._run_id, self._ledger, self._channels, self._clock = run_id, ledger, channels, clock

    async def collect(self, members: Iterable[RunMember]) -> Collected:
        """Ask all of them that can be called, a few at a time. Raises StorageError."""
        members = tuple(members)
        await asyncio.to_thread(self._ledger.see, members)
        room = asyncio.Semaphore(MAX_AT_ONCE)

        async def visit(address: Address) -> _Visit:
            async with room:
                return await self._visit(address)

        called = [member.address for member in members if member.address.endpoint]
        visits = await _all(map(visit, called))
        await asyncio.to_thread(self._ledger.forget_old, self._clock())
        return Collected(
            asked=len(visits),
            answered=sum(visit.answered for visit in visits),
            new=sum(visit.new for visit in visits),
            refused=sum(visit.refused for visit in visits),
        )

    async def _visit(self, address: Address) -> _Visit:
        """Read on where the last visit ended."""
        n_new = n_refused = n_pages = 0
        try:
            async with within(PEER_TIMEOUT_S, "all receipts"):
                store, after = await asyncio.to_thread(self._ledger.place, address.peer_id)
                while n_pages < MAX_PAGES and n_refused <= MAX_REFUSED:
                    page = await self._page(address, store, after)
                    store, after = page.store, page.next
                    new, refused = await asyncio.to_thread(self._take, address.peer_id, page)
                    n_pages, n_new, n_refused = n_pages + 1, n_new + new, n_refused + refused
                    if not page.more:
                        break
        except StorageError:
            raise
        except KilohiveError as error:
            logger.debug("Peer %s gives no more receipts now: %s", address.peer_id, error)
        finally:
            self._channels.drop(address)
        if n_refused:
            logger.info("%d receipts of peer %s do not hold", n_refused, address.peer_id)
        return _Visit(n_pages > 0, n_new, n_refused)

    async def _page(self, address: Address, store: bytes, after: int) -> pb.ReceiptPage:
        """The next page; raises InvalidInputError for one that cannot be, or that leads nowhere."""
        request = pb.CollectRequest(run_id=self._run_id, store=store, after=after)
        raw = await self._channels.call(address, COLLECT, request.SerializeToString(), CALL_TIMEOUT_S)
        page = parse_message(pb.ReceiptPage, raw, "page", MAX_PAGE_BYTES)
        if len(page.store) != STORE_BYTES or len(page.receipts) > MAX_PAGE_RECEIPTS:
            raise InvalidInputError("page", f"must have a store's id and at most {MAX_PAGE_RECEIPTS} receipts")
        began_at = after if page.store == store else 0
        goes_on = page.next > began_at or (page.next == began_at and not page.receipts and not page.more)
        if not goes_on or page.next >= 1 << 63:
            raise InvalidInputError("page.next", f"is {page.next}, the page began behind {began_at}")
        return page

    def _take(self, peer_id: str, page: pb.ReceiptPage) -> tuple[int, int]:
        """Check a page and take it in; how many of its receipts are new, and how many do not hold. In a thread."""
        key, now_s = public_key_of(peer_id), self._clock()
        checked = [one for message in page.receipts if (one := checked_receipt(message, key, self._run_id, now_s))]
        n_new = self._ledger.take(checked, peer_id, page.store, page.next)
        self._ledger.name(peer_id, _profile_in(page, peer_id))
        return n_new, len(page.receipts) - len(checked)


async def _all(visits: Iterable[Coroutine[Any, Any, _Visit]]) -> list[_Visit]:
    """What came of each; if one raises, that is raised once all have ended."""
    done = await asyncio.gather(*visits, return_exceptions=True)
    for one in done:
        if isinstance(one, BaseException):
            raise one
    return [one for one in done if isinstance(one, _Visit)]


def _profile_in(page: pb.ReceiptPage, peer_id: str) -> Profile | None:
    """What the page's sender wants to be called; None if it is anonymous, or if that is nothing to be shown."""
    if not page.HasField("profile"):
        return None
    try:
        return open_profile(page.profile, peer_id)
    except InvalidInputError as error:
        logger.debug("Peer %s stays without a name: %s", peer_id, error)
        return None


def checked_receipt(message: pb.SignedReceipt, source: bytes, run_id: str, now_s: float) -> Checked | None:
    """What a peer with the key `source` has sent, if it is a receipt of its own, of this run and not too old."""
    try:
        receipt = open_receipt(message)
        check_receipt(receipt, run_id, now_s)
    except InvalidInputError as error:
        logger.debug("Refused a receipt: %s", error)
        return None
    return Checked(receipt, receipt_digest(message)) if source in {receipt.host, receipt.trainer} else None

"""Gets hosts to sign what a trainer claims: a small call for each claim, again later where it fails. On the event loop.

A host that is away, slow or of another mind costs nothing but the credit that it does not sign for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final, TypeVar

from google.protobuf.message import Message

from common.backoff import backoff_s
from common.errors import InternalError, InvalidInputError, KilohiveError, LimitExceededError
from common.seldom import Seldom
from common.text import short_id
from node.credit.answered import PairCounts
from protocol import receipts_pb2 as pb
from protocol.parsing import parse_message
from protocol.receipts import CREDIT_SERVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from node.trainer.credit.claims import Claims, WaitingClaim
    from protocol.channels import Channels
    from protocol.endpoints import Address

Res = TypeVar("Res", bound=Message)
logger = logging.getLogger(__name__)

COUNTERSIGN: Final = f"/{CREDIT_SERVICE}/Countersign"
COUNTED: Final = f"/{CREDIT_SERVICE}/Counted"
CALL_TIMEOUT_S = 10.0
MAX_AT_ONCE = 8
MAX_ANSWER_BYTES = 1024
FIRST_PAUSE_S, MAX_PAUSE_S = 60.0, 3600.0
"""How long a host is left alone after a failure, twice as long after each further one."""


class ClaimSender:
    """`addresses` tells where hosts are called now, by peer id. Belongs to the event loop."""

    def __init__(
        self,
        run_id: str,
        claims: Claims,
        channels: Channels,
        addresses: Callable[[], Mapping[str, Address]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_id, self._claims, self._channels = run_id, claims, channels
        self._addresses, self._clock = addresses, clock
        self._failures: dict[str, int] = {}
        self._next_s: dict[str, float] = {}
        self._told = Seldom()

    async def send(self) -> None:
        """Send what waits for hosts that are there, and that have not failed of late. Raises StorageError."""
        waiting, addresses = await asyncio.to_thread(self._claims.waiting), self._addresses()
        self._forget(waiting)
        room = asyncio.Semaphore(MAX_AT_ONCE)

        async def send_to(host_id: str, claims: Sequence[WaitingClaim]) -> None:
            async with room:
                await self._send_to(addresses[host_id], claims)

        now_s = self._clock()
        due = [host_id for host_id in waiting if host_id in addresses and self._next_s.get(host_id, now_s) <= now_s]
        async with asyncio.TaskGroup() as group:
            for host_id in due:
                group.create_task(send_to(host_id, waiting[host_id]), name="claims")

    async def _send_to(self, address: Address, claims: Sequence[WaitingClaim]) -> None:
        """One after the other, as hosts sign no interval before one that they have signed."""
        host_id = address.peer_id
        try:
            for claim in claims:
                await self._send_one(address, claim)
        except KilohiveError as error:
            failures = self._failures[host_id] = self._failures.get(host_id, 0) + 1
            self._next_s[host_id] = self._clock() + backoff_s(FIRST_PAUSE_S, failures - 1, max_s=MAX_PAUSE_S)
            logger.debug("Host %s does not sign now: %s", host_id, error)
        else:
            self._failures.pop(host_id, None)
            self._next_s.pop(host_id, None)

    async def _send_one(self, address: Address, claim: WaitingClaim) -> None:
        """Have a claim signed, for less if need be, or give it up. Raises KilohiveError for what may pass."""
        try:
            await self._sign(address, claim)
        except LimitExceededError as error:
            lowered = None if claim.lowered else await self._lowered(address, claim)
            if lowered is not None:
                await self._send_one(address, lowered)
            elif claim.lowered:
                await self._give_up(address, claim, error)
        except InvalidInputError as error:
            await self._give_up(address, claim, error)

    async def _sign(self, address: Address, claim: WaitingClaim) -> None:
        answer = await self._call(address, COUNTERSIGN, claim.message, pb.CountersignResponse)
        try:
            await asyncio.to_thread(self._claims.settle, claim, answer.host_signature)
        except InvalidInputError as error:
            raise InternalError(f"what the host answers is no signature of its own: {error}") from None

    async def _lowered(self, address: Address, claim: WaitingClaim) -> WaitingClaim | None:
        """The claim made again for no more than the host has counted; None if that is nothing."""
        said = await self._call(address, COUNTED, pb.CountedRequest(run_id=self._run_id), pb.CountedResponse)
        counted = PairCounts(said.forward_pairs, said.backward_pairs)
        return await asyncio.to_thread(self._claims.lower, claim, counted)

    async def _call(self, address: Address, path: str, request: Message, kind: type[Res]) -> Res:
        raw = await self._channels.call(address, path, request.SerializeToString(), CALL_TIMEOUT_S)
        try:
            return parse_message(kind, raw, "response", MAX_ANSWER_BYTES)
        except InvalidInputError as error:  # told apart from one that the host raises about the claim
            raise InternalError(f"what the host answers is not valid: {error}") from None

    async def _give_up(self, address: Address, claim: WaitingClaim, error: InvalidInputError) -> None:
        if self._told.due(address.peer_id):
            logger.info("Host %s does not sign for what it answered: %s", short_id(address.peer_id), error)
        await asyncio.to_thread(self._claims.give_up, claim)

    def _forget(self, waiting: Mapping[str, object]) -> None:
        """Remember no failures of hosts for whom nothing waits."""
        self._failures = {host_id: n for host_id, n in self._failures.items() if host_id in waiting}
        self._next_s = {host_id: next_s for host_id, next_s in self._next_s.items() if host_id in waiting}

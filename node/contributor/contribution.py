"""One contribution from offer to hosts: as many evaluators as are needed, their verdicts, every live replica."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from typing import TYPE_CHECKING, NamedTuple

from common.errors import DeadlineError, KilohiveError, OverloadedError, UnavailableError, UnknownRequestError
from common.tasks import within
from common.text import peer_words, short_id
from dht.view import evaluators_named
from node.model.expert_file import ExpertId
from protocol import contribution_pb2 as pb
from protocol.endpoints import Address
from protocol.verdict import needed_verdicts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dht.directory import Directory
    from dht.view import PeerInfo
    from node.contributor.client import ContributionClient
    from protocol.manifest import Manifest
    from protocol.verdict import Offered

logger = logging.getLogger(__name__)

ASK_EVERY_S = 0.5
FIND_S = 15.0
"""How long to wait for records that are still on their way to this node."""

DELIVERIES = 3
RETRY_S = 1.0
"""A host that takes another expert in, or does not know of the owner's word yet, is asked again."""

MAX_WHY_CHARS = 300
SETTLED = (pb.GAINED, pb.REFUSED, pb.NOT_TESTED)


class Outcome(NamedTuple):
    """What became of it, in a sentence."""

    taken_in: bool
    words: str


class Contribution:
    """Belongs to the event loop; `tell` hears how far it is, in words, whenever that may have changed."""

    def __init__(
        self,
        manifest: Manifest,
        directory: Directory,
        client: ContributionClient,
        file: tuple[Offered, bytes],
        tell: Callable[[str], None],
    ) -> None:
        self._manifest, self._directory, self._client, self._tell = manifest, directory, client, tell
        self._offered, self._data = file
        self._place = ExpertId(self._offered.layer, self._offered.expert)
        self._told: dict[str, str] = {}

    async def run(self, timeout_s: float) -> Outcome:
        """Offer, wait for what the evaluators say, deliver. Raises a KilohiveError where nobody can say anything."""
        async with within(timeout_s, "the contribution"):
            evaluators = await self._evaluators()
            async with asyncio.TaskGroup() as group:
                trying = [group.create_task(self._evaluated(peer_id)) for peer_id in evaluators]
            answers = [task.result() for task in trying]
            for answer in answers:
                if answer.state != pb.GAINED:
                    return Outcome(taken_in=False, words=f"not taken in: {_reason(answer)}")
            return await self._deliver(answers)

    async def _evaluators(self) -> Sequence[str]:
        """Return as many evaluators that are up as a host wants verdicts from."""
        named: Sequence[str] = ()
        live: list[str] = []
        for _ in range(round(FIND_S / ASK_EVERY_S)):
            named = evaluators_named(self._directory.peers(), self._manifest.owner)
            live = [peer_id for peer_id in named if self._trainer(peer_id)]
            if named and len(live) >= needed_verdicts(len(named)):
                return random.sample(live, needed_verdicts(len(named)))
            await asyncio.sleep(ASK_EVERY_S)
        if not named:
            raise UnavailableError(
                "this run takes no offers now: its owner's coordinator is not up, or names no evaluators (--evaluators)"
            )
        raise UnavailableError(f"{len(live)} of the run's evaluators are up, {needed_verdicts(len(named))} are needed")

    def _trainer(self, peer_id: str) -> PeerInfo | None:
        peers = self._directory.peers()
        return next((p for p in peers if p.peer_id == peer_id and p.role == "trainer" and p.endpoint), None)

    async def _evaluated(self, peer_id: str) -> pb.OfferStatus:
        """What one evaluator says in the end. One that begins anew is offered the file once more."""
        is_there, address = False, Address(peer_id, "")
        while True:
            trainer = self._trainer(peer_id)
            address = Address(peer_id, trainer.endpoint) if trainer else address
            wait_s = ASK_EVERY_S
            try:
                call = self._client.ask(address, self._offered) if is_there else self._offer(address)
                status = await call
                is_there = True
                self._say(peer_id, _progress(status))
                if status.state in SETTLED:
                    return status
            except UnknownRequestError:
                is_there = False
            except OverloadedError as error:
                wait_s = error.retry_after_s
                self._say(peer_id, str(error))
            except (UnavailableError, DeadlineError) as error:
                self._say(peer_id, f"does not answer: {error}")
            await asyncio.sleep(wait_s)

    async def _offer(self, address: Address) -> pb.OfferStatus:
        return await self._client.offer(address, self._offered, self._data)

    async def _deliver(self, answers: Sequence[pb.OfferStatus]) -> Outcome:
        block_id = self._place.block(self._manifest.model)
        hosts = [replica.address for replica in self._directory.replicas(block_id)]
        verdicts = [answer.verdict for answer in answers]
        problems = await asyncio.gather(*(self._taken_in(host, verdicts) for host in hosts))
        refusals = [problem for problem in problems if problem]
        n_taken = len(hosts) - len(refusals)
        what = f"{_gain(answers[0])} over {answers[0].n_windows} held-out windows"
        if n_taken:
            words = f"taken in by {n_taken} of {len(hosts)} hosts of block {block_id}: {what}"
            return Outcome(taken_in=True, words="; ".join([words, *refusals]))
        why = "; ".join(refusals) or "no host of it is live"
        return Outcome(taken_in=False, words=f"not taken in, though {what}: {why}")

    async def _taken_in(self, host: Address, verdicts: Sequence[pb.SignedVerdict]) -> str:
        """Why not; empty if it is."""
        problem = ""
        for _ in range(DELIVERIES):
            try:
                await self._client.take_in(host, self._offered, self._data, verdicts)
            except (OverloadedError, UnavailableError) as error:
                problem = str(error)
                await asyncio.sleep(RETRY_S)
            except KilohiveError as error:
                problem = str(error)
                break
            else:
                return ""
        return f"host {short_id(host.peer_id)} did not take it in: {peer_words(problem, MAX_WHY_CHARS)}"

    def _say(self, peer_id: str, words: str) -> None:
        self._told[peer_id] = f"evaluator {short_id(peer_id)}: {peer_words(words, MAX_WHY_CHARS)}"
        self._tell("; ".join(self._told.values()))


def _progress(status: pb.OfferStatus) -> str:
    if status.state == pb.WAITING:
        return f"waits behind {status.ahead} others" if status.ahead else "waits for the trainer's next free moment"
    if status.state == pb.EVALUATING:
        return f"{status.n_windows} of {status.of_windows} held-out windows, {_gain(status)}"
    return str(pb.OfferState.Name(status.state)).replace("_", " ").lower()


def _gain(status: pb.OfferStatus) -> str:
    if not (math.isfinite(status.low) and math.isfinite(status.high) and status.n_windows):
        return "gain not known yet"
    return f"it gains {status.low:.3g} to {status.high:.3g} nats per token"


def _reason(status: pb.OfferStatus) -> str:
    why = peer_words(status.why, MAX_WHY_CHARS)
    return f"{why} ({_gain(status)}, {status.n_windows} windows)" if status.n_windows else why

"""Offers that wait on a trainer, and what became of those it has tried. No sockets, no clock of its own.

One waits for each peer, and eight in all: a peer with many keys can fill the line, and no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import OverloadedError, UnknownRequestError
from protocol import contribution_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.model.expert_file import Weights
    from node.trainer.evaluator.sequential_test import Decision
    from protocol.verdict import Offered

MAX_WAITING = 8
MAX_KNOWN = 64
"""The most offers that are known, the settled ones included, so that their peers can still ask."""

FORGET_S = 60.0
"""Who has not asked for so long has left."""

RETRY_AFTER_S = 5.0
OPEN = (pb.WAITING, pb.EVALUATING)


@dataclass(eq=False, kw_only=True)
class Offer:
    """One file of one peer. `weights` are let go of when it is settled."""

    caller: str
    offered: Offered
    weights: Weights
    asked_s: float
    state: pb.OfferState = pb.WAITING
    of_windows: int = 0
    decision: Decision | None = None
    why: str = ""
    verdict: pb.SignedVerdict | None = None

    @property
    def is_open(self) -> bool:
        """Whether it waits or is being evaluated."""
        return self.state in OPEN

    def settle(self, state: pb.OfferState, why: str = "", verdict: pb.SignedVerdict | None = None) -> None:
        """Nothing more is done about it."""
        self.state, self.why, self.verdict, self.weights = state, why, verdict, {}


class OfferQueue:
    """Offers by peer and file, oldest first. Belongs to the event loop; `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[tuple[str, Offered], Offer] = {}

    def known(self, caller: str, offered: Offered) -> Offer | None:
        """Return the same peer's offer of the same file, if there is one; that counts as asking for it."""
        offer = self._known.get((caller, offered))
        if offer is None or offer.state == pb.NOT_TESTED:
            return None
        offer.asked_s = self._clock()
        return offer

    def check_capacity(self, caller: str) -> None:
        """Raise OverloadedError unless one more of this peer may wait."""
        self._forget()
        waiting = [offer for offer in self._known.values() if offer.is_open]
        if any(offer.caller == caller for offer in waiting):
            raise OverloadedError("another offer of yours waits here already", RETRY_AFTER_S)
        if len(waiting) >= MAX_WAITING:
            raise OverloadedError(f"{len(waiting)} offers wait here, the limit is {MAX_WAITING}", RETRY_AFTER_S)

    def add(self, caller: str, offered: Offered, weights: Weights) -> Offer:
        """Have it wait; raises OverloadedError like `check_room`."""
        self.check_capacity(caller)
        offer = Offer(caller=caller, offered=offered, weights=weights, asked_s=self._clock())
        self._known.pop((caller, offered), None)
        self._known[caller, offered] = offer
        settled = [name for name, known in self._known.items() if not known.is_open]
        for name in settled[: max(0, len(self._known) - MAX_KNOWN)]:
            del self._known[name]
        return offer

    def ask(self, caller: str, offered: Offered) -> Offer:
        """One's own offer; UnknownRequestError if it is not known here, or not any more."""
        offer = self._known.get((caller, offered))
        if offer is None:
            raise UnknownRequestError("this trainer does not know the offer: it may have begun anew; offer it again")
        offer.asked_s = self._clock()
        return offer

    def next(self) -> Offer | None:
        """The one that waits longest and whose peer still asks."""
        self._forget()
        return next((offer for offer in self._known.values() if offer.state == pb.WAITING), None)

    def is_left(self, offer: Offer) -> bool:
        """Whether nobody asks any more."""
        return self._clock() - offer.asked_s > FORGET_S

    def status(self, offer: Offer) -> pb.OfferStatus:
        """What its peer is told."""
        waiting = [known for known in self._known.values() if known.is_open]
        decision = offer.decision
        return pb.OfferStatus(
            state=offer.state,
            ahead=waiting.index(offer) if offer in waiting else 0,
            n_windows=decision.n_windows if decision else 0,
            of_windows=offer.of_windows,
            low=decision.low if decision else 0.0,
            high=decision.high if decision else 0.0,
            why=offer.why,
            verdict=offer.verdict,
        )

    def _forget(self) -> None:
        """Forget the offers that nobody waits for. What is being evaluated ends by itself."""
        self._known = {
            name: offer
            for name, offer in self._known.items()
            if not (offer.state == pb.WAITING and self.is_left(offer))
        }

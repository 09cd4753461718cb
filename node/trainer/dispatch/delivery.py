"""Gets the pairs of one layer answered: calls the peers, fails over to other replicas, hedges late calls.

One mechanism for both ways through a layer. It runs in a compute thread, which encodes and decodes; the calls
themselves run on the event loop. Every call ends before the step's deadline.

A call whose pairs have another replica gets half of the time that is left: a peer that is frozen then costs half of
the step's deadline and the other replica still has its turn. A late call is hedged: its pairs go to other replicas
too, in one or more calls, and whichever side is complete first counts (J. Dean and L. A. Barroso, "The Tail at Scale",
CACM 2013). A side that fails leaves the pairs to the other.

A call that got lost is repeated once, at the same peer: under its own id it steps experts no more than once there.
"""

from __future__ import annotations

import concurrent.futures
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from common.errors import (
    DrainingError,
    InvalidInputError,
    KilohiveError,
    NotHostedError,
    RefusedError,
    UnauthenticatedError,
    UnavailableError,
    UnknownRunError,
)
from node.trainer.dispatch.loop_bridge import LOOP_GRACE_S, LOOP_STOPPED
from protocol.call_errors import is_lost

if TYPE_CHECKING:
    from collections.abc import Iterable

    from node.trainer.dispatch.loop_bridge import LoopBridge
    from node.trainer.dispatch.peers import Peers
    from node.trainer.dispatch.plan import Part, Planner

MIN_CALL_S = 0.05
"""The least time before the deadline with which a call is still started."""


class DispatchRequest(Protocol):
    """What one peer is asked."""

    @property
    def part(self) -> Part:
        """The pairs it is asked for."""


Q = TypeVar("Q", bound=DispatchRequest)
M = TypeVar("M")
A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)


class Work(Protocol[Q, M, A_co]):
    """One way through a layer: what is asked, and what an answer means."""

    def elsewhere(self, part: Part, before: Q, error: KilohiveError | None) -> Q:
        """The request for `part` of what `before` asked for, which failed with `error` or (None) is only late."""

    def again(self, request: Q, error: KilohiveError) -> Q | None:
        """What to ask the same peer after `error`, if that is no failure."""

    async def send(self, request: Q, timeout_s: float, *, patient: bool) -> M:
        """Call the peer; a patient call waits for a peer that is overloaded. Raises a KilohiveError."""

    def accept(self, request: Q, response: M, seconds: float) -> A_co:
        """The checked answer, which took `seconds`; raises a KilohiveError for anything that is off."""


@dataclass(frozen=True, kw_only=True)
class DeliveryLimits:
    """`deadline` is a time of time.monotonic(); a call is late after `hedge_after_s`, never if that is None."""

    deadline: float
    hedge_after_s: float | None = None


@dataclass(eq=False)
class _Call(Generic[Q, M, A]):
    """One call. Those in `hedges` stand against it; `hedge_of` is the one that this one stands against."""

    request: Q
    future: concurrent.futures.Future[tuple[M, float]]
    sent_at: float
    hedge_of: _Call[Q, M, A] | None = None
    hedges: list[_Call[Q, M, A]] = field(default_factory=list)
    may_hedge: bool = True
    is_repeat: bool = False
    answer: A | None = None


class Delivery(Generic[Q, M, A]):
    """One pass through one layer. Use once, from one thread."""

    def __init__(
        self, planner: Planner, work: Work[Q, M, A], peers: Peers, calls: LoopBridge, limits: DeliveryLimits
    ) -> None:
        self._planner, self._work, self._peers, self._calls, self._limits = planner, work, peers, calls, limits
        self._pending: dict[concurrent.futures.Future[tuple[M, float]], _Call[Q, M, A]] = {}
        self._answered: list[tuple[Q, A]] = []

    def run(self, first: Iterable[Q]) -> list[tuple[Q, A]]:
        """What was answered of the requests in `first` or in their place, in an order that timing does not change.

        Raises DrainingError when the node leaves meanwhile.
        """
        try:
            for request in first:
                self._start(request)
            while self._pending:
                for future in self._wait():
                    self._settle(future)
                self._hedge_late()
        except concurrent.futures.CancelledError:
            raise DrainingError("this trainer is leaving") from None
        finally:
            for future in self._pending:
                future.cancel()
        return sorted(self._answered, key=lambda answered: int(answered[0].part.flat[0]))

    def _start(
        self, request: Q, hedge_of: _Call[Q, M, A] | None = None, *, is_repeat: bool = False
    ) -> _Call[Q, M, A] | None:
        now = time.monotonic()
        left_s = self._limits.deadline - now
        if left_s < MIN_CALL_S:
            return None
        has_others = self._planner.has_others(request.part)
        future = self._calls.start(self._send(request, left_s / 2 if has_others else left_s, patient=not has_others))
        call = _Call(request, future, now, hedge_of=hedge_of, may_hedge=hedge_of is None, is_repeat=is_repeat)
        self._pending[future] = call
        return call

    async def _send(self, request: Q, timeout_s: float, *, patient: bool) -> tuple[M, float]:
        started = time.monotonic()
        with self._peers.in_flight(request.part.replica.peer_id, len(request.part.tokens)):
            response = await self._work.send(request, timeout_s, patient=patient)
        return response, time.monotonic() - started

    def _wait(self) -> set[concurrent.futures.Future[tuple[M, float]]]:
        """The calls that have ended, once one has; none if one has become late first."""
        stopped_at = self._limits.deadline + LOOP_GRACE_S
        late_at = min((self._late_at(call) for call in self._pending.values()), default=stopped_at)
        timeout_s = max(0.0, min(late_at, stopped_at) - time.monotonic())
        done, _ = concurrent.futures.wait(self._pending, timeout_s, concurrent.futures.FIRST_COMPLETED)
        if not done and late_at >= stopped_at:
            raise UnavailableError(LOOP_STOPPED)
        return done

    def _settle(self, future: concurrent.futures.Future[tuple[M, float]]) -> None:
        call = self._pending.pop(future, None)
        if call is None:  # its rival was complete a moment earlier
            return
        try:
            response, seconds = future.result(0)
        except KilohiveError as error:
            self._failed(call, _as_refusal(error))
            return
        try:
            answer = self._work.accept(call.request, response, seconds)
        except KilohiveError as error:
            self._failed(call, error)
            return
        self._peers.answered(call.request.part.replica.peer_id)
        self._take(call, answer)

    def _take(self, call: _Call[Q, M, A], answer: A) -> None:
        call.answer, late = answer, call.hedge_of
        if late is None:
            self._answered.append((call.request, answer))
            self._drop_hedges(call)
            return
        answers = _answers(late.hedges)
        if len(answers) == len(late.hedges):
            part = late.request.part
            self._cancel(late)
            self._peers.outpaced(part.replica.peer_id, time.monotonic() - late.sent_at, len(part.tokens))
            self._answered += answers

    def _failed(self, call: _Call[Q, M, A], error: KilohiveError) -> None:
        again = self._work.again(call.request, error)
        if again is not None:
            self._start(again, is_repeat=call.is_repeat)
            return
        if is_lost(error) and self._repeat(call):
            self._peers.repeated(call.request.part.replica, error)
            return
        groups = self._planner.failed(call.request.part, error)
        if call.hedge_of is not None:
            self._drop_hedges(call.hedge_of)
        elif call.hedges:
            self._promote(call.hedges)
        else:
            for flat in groups:
                for part in self._planner.plan(flat)[0]:
                    self._start(self._work.elsewhere(part, call.request, error))

    def _repeat(self, call: _Call[Q, M, A]) -> bool:
        """Send a call once more, unless others stand against it or no time is left."""
        if call.is_repeat or call.hedges or call.hedge_of is not None:
            return False
        return self._start(call.request, is_repeat=True) is not None

    def _promote(self, hedges: list[_Call[Q, M, A]]) -> None:
        """The late call has failed: its hedges are the failover, and fail over like any other call."""
        for hedge in hedges:
            hedge.hedge_of = None
        self._answered += _answers(hedges)

    def _hedge_late(self) -> None:
        now = time.monotonic()
        for call in [call for call in self._pending.values() if self._late_at(call) <= now]:
            call.may_hedge = False
            request = call.request
            parts, orphans = self._planner.plan(request.part.flat, without=request.part.replica.peer_id)
            if len(orphans) or self._limits.deadline - now < 2 * MIN_CALL_S:
                continue
            started = (self._start(self._work.elsewhere(part, request, None), hedge_of=call) for part in parts)
            call.hedges = [hedge for hedge in started if hedge is not None]
            self._peers.hedged()

    def _late_at(self, call: _Call[Q, M, A]) -> float:
        if self._limits.hedge_after_s is None or not call.may_hedge:
            return math.inf
        return call.sent_at + self._limits.hedge_after_s

    def _drop_hedges(self, call: _Call[Q, M, A]) -> None:
        for hedge in call.hedges:
            self._cancel(hedge)
        call.hedges = []

    def _cancel(self, call: _Call[Q, M, A]) -> None:
        if self._pending.pop(call.future, None) is not None:
            call.future.cancel()


def _as_refusal(error: KilohiveError) -> KilohiveError:
    """RefusedError for what a peer finds wrong with this node or its request; other errors as they are."""
    if isinstance(error, (NotHostedError, UnknownRunError)):
        return error
    return RefusedError(str(error)) if isinstance(error, (InvalidInputError, UnauthenticatedError)) else error


def _answers(calls: list[_Call[Q, M, A]]) -> list[tuple[Q, A]]:
    return [(call.request, call.answer) for call in calls if call.answer is not None]

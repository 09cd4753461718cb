"""The pages' server: which path gives what. It only ever answers, from what the watch saw last, and changes nothing.

Path of a request: uvicorn -> WithHeaders -> common.web.request_checks -> **app**.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastapi.responses import Response

from common.web.application import json_answer, web_application
from common.web.event_stream import event_stream
from common.web.files import WithHeaders, file_endpoint
from common.web.http_errors import NOT_FOUND, HttpError
from common.web.request_checks import RequestChecks
from coordinator.credit.show import sums_csv, sums_json
from coordinator.dashboard import answers
from coordinator.dashboard.answers import CreditKind  # noqa: TC001 - FastAPI reads the annotation
from coordinator.dashboard.files import web_files
from coordinator.dashboard.history import SPANS

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.web.application import Endpoint
    from common.web.feed import Feed
    from common.web.request_checks import CheckConfig
    from coordinator.dashboard.credit import CreditWatch
    from coordinator.dashboard.history_thread import HistoryThread
    from coordinator.dashboard.joining import WaysIn
    from coordinator.dashboard.watch import RunWatch

Role = Literal["all", "host", "trainer", "coordinator", "lighthouse"]
Span = Literal["hour", "day", "week", "all"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Where endpoints find what they show."""

    watch: RunWatch
    feed: Feed
    history: HistoryThread
    credit: CreditWatch
    ways_in: WaysIn
    now_s: Callable[[], float]


def build_app(shown: Shown, checks: Callable[[frozenset[str]], CheckConfig]) -> WithHeaders:
    """The application that uvicorn runs; `checks` is told which paths have nothing of the run and need no key."""
    served, endpoints = web_files(), PageEndpoints(shown)
    routes: dict[str, Endpoint] = {
        "/health": endpoints.health,
        "/api/overview": endpoints.overview,
        "/api/join": endpoints.join,
        "/api/history": endpoints.history,
        "/api/peers": endpoints.peers,
        "/api/peer": endpoints.peer,
        "/api/layer": endpoints.layer,
        "/api/credit": endpoints.credit,
        "/api/credit.csv": endpoints.credit_csv,
        "/api/credit.json": endpoints.credit_json,
        "/api/events": endpoints.events,
        **dict.fromkeys(served, file_endpoint(served)),
    }
    for_all = frozenset({*served, "/health"})
    return WithHeaders(RequestChecks(web_application(routes), checks(for_all), frozenset(routes)))


class PageEndpoints:
    """What each path gives."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    async def health(self) -> Response:
        """Whether the run is seen, in words."""
        problem = self._shown.watch.problem
        words = {"status": "unavailable" if problem else "ok", "message": problem or "the run is seen"}
        return json_answer(answers.encoded(words), 503 if problem else 200)

    async def overview(self) -> Response:
        """The whole run."""
        return json_answer(self._shown.watch.overview)

    async def join(self) -> Response:
        """The invite, and what to type."""
        return json_answer(answers.encoded(self._shown.ways_in.as_json(self._shown.now_s())))

    async def history(self, span: Span = "hour") -> Response:
        """Figures over time, and held-out loss over tokens."""
        history, now_s = self._shown.history, self._shown.watch.snapshot.view.taken_s
        found, evaluations = await asyncio.gather(history.curves(span, now_s), history.evaluations())
        told = answers.curves(found, evaluations) | {"now_s": now_s, "span_s": SPANS[span]}
        return json_answer(answers.encoded(told))

    async def peers(self, role: Role = "all", search: str = "", page: int = 1) -> Response:
        """A page of peers, by their tokens."""
        return json_answer(answers.encoded(answers.peers(self._shown.watch.snapshot, role, search, page)))

    async def peer(self, id: str, page: int = 1) -> Response:  # noqa: A002 - that is what it is called in the query
        """One peer."""
        found = answers.peer(self._shown.watch.snapshot, id, page)
        if found is None:
            message = "id: no such peer is announced now; it may have left, or its records have expired"
            return HttpError(status=NOT_FOUND, message=message, param="id").response()
        return json_answer(answers.encoded(found))

    async def layer(self, layer: int, page: int = 1) -> Response:
        """One layer."""
        return json_answer(answers.encoded(answers.layer(self._shown.watch.snapshot, layer, page)))

    async def credit(self, kind: CreditKind = "hosts", page: int = 1) -> Response:
        """A page of what was earned."""
        return json_answer(answers.encoded(answers.credit(self._shown.credit, kind, page)))

    async def credit_csv(self) -> Response:
        """All that was earned, as a table for spreadsheets."""
        text = await asyncio.to_thread(sums_csv, self._shown.credit.sums)
        return Response(text, headers={"Cache-Control": "no-store"}, media_type="text/csv; charset=utf-8")

    async def credit_json(self) -> Response:
        """All that was earned, for programs."""
        return json_answer((await asyncio.to_thread(sums_json, self._shown.credit.sums)).encode())

    async def events(self) -> Response:
        """The overview, again and again."""
        return event_stream(self._shown.feed, "overview")

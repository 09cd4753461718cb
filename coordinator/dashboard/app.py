"""The pages' server: which path gives what. It only ever answers, from what the watch saw last, and changes nothing.

Path of a request: uvicorn -> WithHeaders -> common.web.request_checks -> **app**.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from common.errors import KilohiveError
from common.web.http_errors import ERROR, FAILED, NOT_FOUND, HttpError, http_error, unfit_body
from common.web.request_checks import RequestChecks
from coordinator.dashboard import answers
from coordinator.dashboard.files import WithHeaders, web_files
from coordinator.dashboard.history import SPANS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.types import Message, Receive, Scope, Send

    from common.web.request_checks import CheckConfig
    from coordinator.dashboard.feed import Client, Feed
    from coordinator.dashboard.history_thread import HistoryThread
    from coordinator.dashboard.joining import WaysIn
    from coordinator.dashboard.watch import RunWatch

NO_NEWS_S: Final = 10.0
"""A page without news for so long is sent a sign of life, so that nothing on the way gives it up."""
SLOW_S: Final = 10.0
"""A page that takes nothing of what it is sent for so long is dropped; it asks again when it is back."""
NO_NEWS: Final = b": nothing new\n\n"
Role = Literal["all", "host", "trainer", "coordinator", "lighthouse"]
Span = Literal["hour", "day", "week", "all"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Where endpoints find what they show."""

    watch: RunWatch
    feed: Feed
    history: HistoryThread
    ways_in: WaysIn
    now_s: Callable[[], float]


def build_app(shown: Shown, checks: Callable[[frozenset[str]], CheckConfig]) -> WithHeaders:
    """The application that uvicorn runs; `checks` is told which paths have nothing of the run and need no key."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    served, endpoints = web_files(), PageEndpoints(shown)
    routes: dict[str, Callable[..., Awaitable[Response]]] = {
        "/health": endpoints.health,
        "/api/overview": endpoints.overview,
        "/api/join": endpoints.join,
        "/api/history": endpoints.history,
        "/api/peers": endpoints.peers,
        "/api/peer": endpoints.peer,
        "/api/layer": endpoints.layer,
        "/api/events": endpoints.events,
        **dict.fromkeys(served, _file_endpoint(served)),
    }
    for path, endpoint in routes.items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    handlers: dict[type[Exception], Any] = {
        KilohiveError: _on_error,
        RequestValidationError: _on_unfit_query,
        HTTPException: _on_http_exception,
        Exception: _on_bug,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    for_all = frozenset({*served, "/health"})
    return WithHeaders(RequestChecks(app, checks(for_all), frozenset(routes)))


class PageEndpoints:
    """What each path gives."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    async def health(self) -> Response:
        """Whether the run is seen, in words."""
        problem = self._shown.watch.problem
        words = {"status": "unavailable" if problem else "ok", "message": problem or "the run is seen"}
        return _json(answers.encoded(words), 503 if problem else 200)

    async def overview(self) -> Response:
        """The whole run."""
        return _json(self._shown.watch.overview)

    async def join(self) -> Response:
        """The invite, and what to type."""
        return _json(answers.encoded(self._shown.ways_in.as_json(self._shown.now_s())))

    async def history(self, span: Span = "hour") -> Response:
        """Figures over time, and held-out loss over tokens."""
        history, now_s = self._shown.history, self._shown.watch.snapshot.view.taken_s
        found, evaluations = await asyncio.gather(history.curves(span, now_s), history.evaluations())
        told = answers.curves(found, evaluations) | {"now_s": now_s, "span_s": SPANS[span]}
        return _json(answers.encoded(told))

    async def peers(self, role: Role = "all", search: str = "", page: int = 1) -> Response:
        """A page of peers, by their tokens."""
        return _json(answers.encoded(answers.peers(self._shown.watch.snapshot, role, search, page)))

    async def peer(self, id: str, page: int = 1) -> Response:  # noqa: A002 - that is what it is called in the query
        """One peer."""
        found = answers.peer(self._shown.watch.snapshot, id, page)
        if found is None:
            message = "id: no such peer is announced now; it may have left, or its records have expired"
            return HttpError(status=NOT_FOUND, message=message, param="id").response()
        return _json(answers.encoded(found))

    async def layer(self, layer: int, page: int = 1) -> Response:
        """One layer."""
        return _json(answers.encoded(answers.layer(self._shown.watch.snapshot, layer, page)))

    async def events(self) -> Response:
        """The overview, again and again."""
        with ExitStack() as stack:
            client = stack.enter_context(self._shown.feed.joined())
            return OverviewStream(_events(client), stack.pop_all())


class OverviewStream(StreamingResponse):
    """Server-sent events; `until` ends with them, however they end."""

    def __init__(self, events: AsyncIterator[bytes], until: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._until = until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, until the page is closed or takes no more."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SLOW_S):
                await send(message)

        with self._until, contextlib.suppress(TimeoutError):
            await super().__call__(scope, receive, send_in_time)


async def _events(client: Client) -> AsyncIterator[bytes]:
    while not client.has_ended:
        message = await client.news(NO_NEWS_S)
        yield NO_NEWS if message is None else b"event: overview\ndata: " + message + b"\n\n"


def _file_endpoint(served: dict[str, Any]) -> Callable[..., Awaitable[Response]]:
    async def file(request: Request) -> Response:
        response: Response = served[request.url.path].response(request.headers.get("if-none-match"))
        return response

    return file


def _json(content: bytes, status: int = 200) -> Response:
    return Response(content, status, {"Cache-Control": "no-store"}, "application/json")


async def _on_error(_request: Request, error: KilohiveError) -> Response:
    return http_error(error).response()


async def _on_unfit_query(_request: Request, error: RequestValidationError) -> Response:
    return unfit_body(error.errors()).response()


async def _on_http_exception(_request: Request, error: HTTPException) -> Response:
    return HttpError(status=error.status_code, message=str(error.detail)).response()


async def _on_bug(_request: Request, _error: Exception) -> Response:
    return HttpError(status=ERROR, message="the server has failed; its log says how", kind=FAILED).response()

"""The endpoints: from a request to texts of the batch, and from their pieces to an answer.

Path of a request: request_checks -> **app** -> requests -> asked -> batch -> answers.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request  # noqa: TC002 - FastAPI reads the annotation
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from common.errors import DeadlineError, DrainingError, KilohiveError
from common.tasks import until_stopped
from common.web.application import web_application
from common.web.http_errors import NOT_FOUND, HttpError, http_error
from common.web.request_checks import RequestChecks
from node.api.answers import END_OF_STREAM, NO_NEWS, Answer, ChatAnswer, Completion, event
from node.api.asked import Asked, WantedTexts, asked_chat, asked_completion, texts_of
from node.api.metrics import ServingCollector
from node.api.page import WebPage
from node.api.requests import ChatRequest, CompletionRequest  # noqa: TC001 - FastAPI reads the annotation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from common.web.application import Endpoint
    from common.web.request_checks import CheckConfig
    from node.api.answers import AnswerKind
    from node.api.batch import ContinuousBatch
    from node.api.requests import GenerationRequest
    from node.api.served_model import ServedModel
    from node.api.written_text import Outbox, Piece

NO_NEWS_S = 10.0
"""A stream without a token for so long says that it is still there, so that nothing on its way gives it up."""
NOBODY_LISTENS = 499


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """`max_tokens` of one text; `request_timeout_s` in seconds, of a whole request."""

    max_tokens: int
    request_timeout_s: float


def build_app(served: ServedModel, batch: ContinuousBatch, config: AppConfig, checks: CheckConfig) -> RequestChecks:
    """The application that uvicorn runs, on the batch's event loop."""
    endpoints = Endpoints(served, batch, config)
    gets: dict[str, Endpoint] = {
        "/": endpoints.page,
        "/health": endpoints.health,
        "/metrics": endpoints.metrics,
        "/v1/models": endpoints.models,
        "/v1/models/{name}": endpoints.model,
    }
    posts: dict[str, Endpoint] = {"/v1/completions": endpoints.completions, "/v1/chat/completions": endpoints.chat}
    checked = RequestChecks(web_application(gets, posts), checks, frozenset({*gets, *posts}))
    endpoints.registry.register(ServingCollector(served, batch, checked.answered))
    return checked


class Endpoints:
    """What each path does."""

    def __init__(self, served: ServedModel, batch: ContinuousBatch, config: AppConfig) -> None:
        self._served, self._batch, self._config = served, batch, config
        self._page = WebPage.read()
        self._cutting = asyncio.Semaphore()
        self.registry = CollectorRegistry()

    async def page(self) -> Response:
        """The page to try the model with."""
        return self._page.response()

    async def health(self) -> Response:
        """Whether a text can be written, in words."""
        count = self._served.experts.count()
        is_well = count.is_enough and not self._batch.failed.done()
        words = str(count) if not self._batch.failed.done() else "the thread that writes has failed"
        return JSONResponse({"status": "ok" if is_well else "unavailable", "message": words}, 200 if is_well else 503)

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """The model, if that is its name."""
        return self._unknown(name) or JSONResponse(self._model())

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """WantedTexts that go on from prompts."""
        if unknown := self._unknown(body.model):
            return unknown
        asked = asked_completion(body, self._config.max_tokens)
        texts = await self._texts(asked)
        beginnings = [text.beginning if body.echo else "" for text in texts.texts]
        return await self._answer(
            request, body, texts, Completion(beginnings, self._served.tokenizer, is_told=asked.is_told)
        )

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Replies to a chat."""
        if unknown := self._unknown(body.model):
            return unknown
        asked = asked_chat(body, self._served, self._config.max_tokens)
        texts = await self._texts(asked)
        kind = ChatAnswer(len(texts.texts), self._served.tokenizer, is_told=asked.is_told)
        return await self._answer(request, body, texts, kind)

    def _model(self) -> dict[str, Any]:
        served = self._served
        return {"id": served.name, "object": "model", "created": served.created_s, "owned_by": "kilohive"}

    def _unknown(self, name: str | None) -> Response | None:
        """The answer to whoever asks for another model; who asks for none means the one that there is."""
        if name in {None, self._served.name}:
            return None
        message = f"model: {name!r} is not served here; it is {self._served.name!r}"
        return HttpError(status=NOT_FOUND, message=message, code="model_not_found", param="model").response()

    async def _texts(self, asked: Asked) -> WantedTexts:
        self._batch.check_fits(asked.n * len(asked.prompts))  # before anything is made of them
        async with self._cutting:  # one at a time: a long text takes a processor for a while
            return await asyncio.to_thread(texts_of, asked, self._served, self._config.max_tokens)

    async def _answer(
        self, request: Request, body: GenerationRequest, texts: WantedTexts, kind: AnswerKind
    ) -> Response:
        deadline_s = asyncio.get_running_loop().time() + self._config.request_timeout_s
        tells_peers = bool(body.kilohive and body.stream)
        answer = Answer(kind, self._served.name, texts.prompt_tokens, tells_peers=tells_peers)
        with ExitStack() as stack:
            outbox = stack.enter_context(self._batch.writing(texts.texts))
            pieces = self._pieces(outbox, len(texts.texts), deadline_s)
            if body.stream:
                events = _events(pieces, answer, includes_usage=body.includes_usage)
                return EventStream(events, stack.pop_all())
            return await _whole(request, pieces, answer, len(texts.texts))

    async def _pieces(self, outbox: Outbox, n_texts: int, deadline_s: float) -> AsyncIterator[Piece | None]:
        """Pieces until every text is finished; None where there is nothing new for a while.

        Raises the error that ended the texts, or DeadlineError.
        """
        loop = asyncio.get_running_loop()
        while n_texts:
            try:
                async with asyncio.timeout_at(min(loop.time() + NO_NEWS_S, deadline_s)):
                    piece = await outbox.get()
            except TimeoutError:
                if loop.time() >= deadline_s:
                    limit_s = self._config.request_timeout_s
                    raise DeadlineError(f"the request took longer than {limit_s:g} s; ask for less") from None
                yield None
                continue
            if isinstance(piece, KilohiveError):
                raise piece
            n_texts -= piece.finish is not None
            yield piece


class EventStream(StreamingResponse):
    """Events, and what is to end with them, however they end."""

    def __init__(self, events: AsyncIterator[bytes], until: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._until = until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, until the client hangs up."""
        with self._until:
            await super().__call__(scope, receive, send)


async def _events(pieces: AsyncIterator[Piece | None], answer: Answer, *, includes_usage: bool) -> AsyncIterator[bytes]:
    for beginning in answer.beginnings():
        yield event(beginning)
    try:
        async for piece in pieces:
            if piece is None:
                yield NO_NEWS
            elif chunk := answer.chunk(piece):
                yield event(chunk)
    except KilohiveError as error:
        yield event(http_error(error).body)
        return
    if includes_usage:
        yield event(answer.usage_chunk())
    yield END_OF_STREAM


async def _whole(request: Request, pieces: AsyncIterator[Piece | None], answer: Answer, n_choices: int) -> Response:
    """All pieces in one answer; whoever hangs up gets none, and his texts end."""
    hung_up = asyncio.Event()
    watch = asyncio.create_task(_watch(request, hung_up))
    try:
        found = await until_stopped(_collected(pieces), hung_up)
    except DrainingError:
        if not hung_up.is_set():
            raise
        return Response(status_code=NOBODY_LISTENS)
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    return JSONResponse(answer.whole(found, n_choices))


async def _collected(pieces: AsyncIterator[Piece | None]) -> list[Piece]:
    return [piece async for piece in pieces if piece is not None]


async def _watch(request: Request, hung_up: asyncio.Event) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    hung_up.set()

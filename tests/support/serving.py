"""A server of a small model whose experts are in this process, and which a test may hold, fail and take away."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from openai import AsyncOpenAI

from common.errors import DrainingError, TooFewExpertsError
from common.tokenizer import ByteTokenizer
from common.web.http_server import listening_socket
from common.web.request_checks import CheckConfig
from node.api.app import AppConfig, build_app
from node.api.batch import BatchLimits, ContinuousBatch
from node.api.chat import PlainChat
from node.api.config import ServeConfig
from node.api.serve_command import serve
from node.api.served_model import ExpertCount, ServedModel
from tests.support.counted_experts import counted_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from common.tokenizer import Tokenizer
    from common.web.request_checks import RequestChecks
    from node.api.chat import Chat
    from node.model.generation import Generation
    from node.trainer.sampling import NewTokens, Step
    from tests.support.counted_experts import CountedExperts

NAME = "test-run"
CONTEXT = 64
MODEL: dict[str, Any] = {
    "gate": "hash",
    "gate_reads": "tokens",
    "gate_score": "softmax",
    "smear": 2,
    "context": CONTEXT,
}
PATIENCE_S = REQUEST_S = 20.0
ANSWERED = {"peer-a": 5, "peer-b": 3}


class ExpertsHere:
    """Experts of a test: `hold` lets no step begin until `release`; `live` is what each of the two layers has.

    A step that finds too few experts is tried again while `waits` says so, which is asked each time.
    """

    def __init__(self) -> None:
        self.live = (16, 16)
        self.waits: Callable[[], bool] = lambda: True
        self._may_step = threading.Event()
        self._may_step.set()
        self._is_closed = False

    def hold(self) -> None:
        self._may_step.clear()

    def release(self) -> None:
        self._may_step.set()

    def until_enough(self, step: Step, generation: Generation) -> NewTokens:
        assert self._may_step.wait(PATIENCE_S)
        while True:
            if self._is_closed:
                raise DrainingError("closed")
            try:
                return step(generation)
            except TooFewExpertsError:
                if not self.waits():
                    raise

    def count(self) -> ExpertCount:
        return ExpertCount(live_by_layer=self.live, per_layer=16)

    def take_answered(self) -> Mapping[str, int]:
        return ANSWERED

    def close(self) -> None:
        self._is_closed = True
        self.release()


@dataclass(kw_only=True)
class SmallModel:
    """A served model, and what a test does to it."""

    served: ServedModel
    here: ExpertsHere
    counted: CountedExperts


def small_model(tokenizer: Tokenizer | None = None, chat: Chat | None = None, **changes: Any) -> SmallModel:
    model, counted = counted_model(tokenizer=tokenizer, **{**MODEL, **changes})
    here = ExpertsHere()
    served = ServedModel(
        name=NAME,
        model=model,
        tokenizer=tokenizer or ByteTokenizer(),
        experts=here,
        chat=chat or PlainChat(),
        created_s=1,
    )
    return SmallModel(served=served, here=here, counted=counted)


@asynccontextmanager
async def running_batch(small: SmallModel, max_batch: int = 4, max_queue: int = 8) -> AsyncIterator[ContinuousBatch]:
    batch = ContinuousBatch(small.served, BatchLimits(max_batch=max_batch, max_queue=max_queue, cache_bytes=1e9))
    batch.start()
    try:
        yield batch
    finally:
        await batch.stop()


@asynccontextmanager
async def app_of(small: SmallModel, batch: ContinuousBatch, key: str = "") -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application alone, without sockets; it gets a stream when that has ended."""
    checks = CheckConfig(key=key, max_body_bytes=10_000)
    app = build_app(small.served, batch, AppConfig(max_tokens=100, request_timeout_s=REQUEST_S), checks)
    async with client_of(app) as client:
        yield client


def client_of(app: RequestChecks) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE_S)


@dataclass(kw_only=True)
class Serving:
    """A real server at `url`."""

    small: SmallModel
    url: str
    stop: asyncio.Event
    task: asyncio.Task[None]
    key: str = ""
    _clients: list[AsyncOpenAI] = field(default_factory=list)

    def openai(self, **changes: Any) -> AsyncOpenAI:
        """OpenAI's client, which tries nothing twice."""
        settings = {"base_url": f"{self.url}/v1", "api_key": self.key or "none", "max_retries": 0, **changes}
        self._clients.append(AsyncOpenAI(timeout=PATIENCE_S, **settings))
        return self._clients[-1]

    async def figure(self, name: str) -> float:
        """A metric of the server."""
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            text = (await client.get(f"{self.url}/metrics")).text
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))

    async def until(self, name: str, value: float) -> None:
        """Return once a metric has a value."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.figure(name) != value:  # noqa: ASYNC110 - another thread's doing
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        for client in self._clients:
            await client.close()
        self.stop.set()
        await self.task


@asynccontextmanager
async def serving(small: SmallModel | None = None, key: str = "", **settings: Any) -> AsyncIterator[Serving]:
    """`serve` without its swarm, on a free port."""
    small = small or small_model()
    config = ServeConfig(key_file=Path("test.key") if key else None, **settings)
    listener, stop = listening_socket("127.0.0.1", 0), asyncio.Event()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    task = asyncio.create_task(serve(config, small.served, listener, key, stop))
    server = Serving(small=small, url=url, stop=stop, task=task, key=key)
    try:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            await _up(client, url)
        yield server
    finally:
        small.here.release()
        with contextlib.suppress(asyncio.CancelledError):
            await server.end()


async def _up(client: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(httpx.ConnectError):
                await client.get(f"{url}/health")
                return
            await asyncio.sleep(0.01)

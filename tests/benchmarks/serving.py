"""python -m tests.benchmarks.serving --json runs/bench/serving.json

Time to the first token, and tokens per second, of streams over HTTP, against the same model without a server: one
stream, and several at once. Medians of runs that take turns. `--tokens 16 --context 64` for a look. Against
`transformers.generate` nothing is compared yet: that needs a model that both can load.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import httpx
import torch
import tyro

from common.allocator import keep_freed_memory
from common.tokenizer import ByteTokenizer
from common.web.http_server import listening_socket
from node.api.chat import PlainChat
from node.api.config import ServeConfig
from node.api.serve_command import serve
from node.api.served_model import ExpertsInProcess, ServedModel
from node.model.generation import Generation, Prompt
from node.model.next_token import GenerationConfig
from tests.benchmarks.generation import new_model, prompts
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare, not_compared

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from node.model.transformer import Transformer

RATE, FIRST = "tokens/s", "first token, ms"
STREAMS = (1, 8)
OURS, THEIRS, LATER = "over HTTP", "the same model in process", "transformers.generate"
UP_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ServingBenchmark(RunsConfig):
    """Tokens per second of streams, and how long the first one takes."""

    tokens: int = 256
    """Write this many tokens in each stream, after a prompt of one."""
    context: int = 512
    """Let the model see this many tokens."""
    threads: int = 1
    """Use this many CPU threads."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one round of streams: the mean time to a stream's first token (seconds), and the tokens per second of all."""

    first_s: float
    rate: float

    def figure(self, metric: str) -> float:
        """The one that a row is of."""
        return self.rate if metric == RATE else 1e3 * self.first_s


def main(config: ServingBenchmark) -> None:
    """Measure, write, print."""
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    tell, model = Teller(), new_model(config.context)
    rows: list[Row] = []
    with server_of(model, config) as url:
        for streams in STREAMS:
            for metric in (RATE, FIRST):
                contenders = {
                    OURS: partial(figure_over_http, url, streams, config.tokens, metric),
                    THEIRS: partial(figure_in_process, model, streams, config.tokens, metric),
                }
                rows += rows_of(streams, metric, config, alternate(contenders, config.runs, tell))
    config.publish("serving", rows, notes(model, config))


@contextmanager
def server_of(model: Transformer, config: ServingBenchmark) -> Iterator[str]:
    """`serve` on an event loop of its own thread, as long as the context lasts; its address."""
    served = ServedModel(
        name="bench",
        model=model,
        tokenizer=ByteTokenizer(),
        experts=ExpertsInProcess(1, 1),
        chat=PlainChat(),
        created_s=0,
    )
    listener, loop, stop = listening_socket("127.0.0.1", 0), asyncio.new_event_loop(), asyncio.Event()
    settings = ServeConfig(max_tokens=config.tokens)
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(settings, served, listener, "", stop),))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.listen()
    thread.start()
    try:
        httpx.get(f"{url}/health", timeout=UP_S)
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(UP_S)
        loop.close()


def figure_over_http(url: str, streams: int, n_tokens: int, metric: str) -> float:
    """One round of streams that begin together."""
    return asyncio.run(over_http(url, streams, n_tokens)).figure(metric)


async def over_http(url: str, streams: int, n_tokens: int) -> Timing:
    """The streams, each over a connection of its own."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:  # noqa: S113 - a round ends by itself
        started_s = time.perf_counter()
        firsts_s = await asyncio.gather(*(stream(client, chr(first), n_tokens) for first in prompts(streams)))
        took_s = time.perf_counter() - started_s
    return Timing(first_s=statistics.mean(firsts_s), rate=streams * n_tokens / took_s)


async def stream(client: httpx.AsyncClient, prompt: str, n_tokens: int) -> float:
    """Read a stream to its end; seconds to its first token, which may be a part of a character."""
    fields = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": True, "kilohive": True}
    first_s, started_s = 0.0, time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=fields) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and "error" in json.loads(line[6:]):
                raise SystemExit(line)
            first_s = first_s or time.perf_counter() - started_s
    return first_s


def figure_in_process(model: Transformer, streams: int, n_tokens: int, metric: str) -> float:
    """The same texts in one batch, without a server."""
    greedy = GenerationConfig(max_new_tokens=n_tokens, temperature=0.0)
    started_s = time.perf_counter()
    generation = Generation(model, [Prompt(ids=[first], config=greedy) for first in prompts(streams)])
    next(generation)
    first_s = time.perf_counter() - started_s
    for _ in generation:
        pass
    took_s = time.perf_counter() - started_s
    return Timing(first_s=first_s, rate=streams * n_tokens / took_s).figure(metric)


def rows_of(
    streams: int, metric: str, config: ServingBenchmark, figures: Mapping[str, Sequence[float]]
) -> tuple[Row, Row]:
    """One number of streams: what was compared, and what is not yet."""
    case = f"{streams} x {config.tokens} tokens, context {config.context}"
    why = "not run: needs a model that both can load"
    return (
        compare(case, metric, figures[OURS], THEIRS, figures[THEIRS]),
        not_compared(case, metric, figures[OURS], LATER, why),
    )


def notes(model: Transformer, config: ServingBenchmark) -> tuple[str, ...]:
    """What was measured."""
    layers, width = len(model.layers), model.embedding_VD.shape[1]
    return (
        f"{layers} layers, D={width}, experts in this process, {config.threads} CPU thread(s)",
        "greedy, each stream after a prompt of one token; tokens of all streams together; first token: mean of streams",
        "clients and server share this process and its cores: a client elsewhere leaves the server more",
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(ServingBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

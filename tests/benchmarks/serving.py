"""python -m tests.benchmarks.serving --json runs/bench/serving.json

Time to the first token, and tokens per second, of one stream and of eight at once. Medians of runs that take turns.

`generate`: SmolLM2 with 1,024 adapters on four hosts, over HTTP, against `transformers.generate` of the model without
adapters. `uncached`: one stream of it, against reading the whole window again for every token. `process`: a small model
of bytes whose experts are in this process, over HTTP, against the same without a server. `--tokens 16 --runs 1` for a
look; `--cases process` for some.
"""

# Shapes: B streams, T tokens of a prompt.

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import httpx
import torch
import tyro
from transformers.generation.streamers import BaseStreamer

from common.allocator import keep_freed_memory
from common.errors import ConfigError
from common.tokenizer import ByteTokenizer
from common.web.http_server import listening_socket
from node.api.chat import PlainChat
from node.api.config import ServeConfig
from node.api.serve_command import serve
from node.api.served_model import ExpertsInProcess, ServedModel
from node.model.generation import Generation, Prompt
from node.model.next_token import GenerationConfig
from tests.benchmarks.generation import new_model, prompts, rate_of, without_cache
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare, not_compared
from tests.benchmarks.served_swarm import EXPERTS, HOSTS, served_smollm2
from tests.benchmarks.streams import FIRST, RATE, Contender, Timing, over_http
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from node.model.trunk import Trunk
    from tests.benchmarks.served_swarm import ServedSwarm

STREAMS: Final = (1, 8)
GENERATE, UNCACHED, PROCESS = CASES = ("generate", "uncached", "process")
OURS, LIBRARY, WHOLE_WINDOW, IN_PROCESS = (
    "over HTTP",
    "transformers.generate, no adapters",
    "the whole window for every token",
    "the same model in process",
)
CPU: Final = "processor time, ms/token"
HOSTS_CPU: Final = "processor time of the hosts, ms/token"
TARGETS: Final = {1: 0.5, 8: 0.7}
"""Least part of the library's tokens per second, by the number of streams."""
UNCACHED_TARGET: Final = 10.0
UP_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ServingBenchmark(RunsConfig):
    """Tokens per second of streams, and how long the first one takes."""

    cases: str = ",".join(CASES)
    """Which, parted by commas."""
    tokens: int = 512
    """Write this many tokens in each stream."""
    prompt_tokens: int = 64
    """Go on from this many tokens, where the model is SmolLM2; the small one goes on from one."""
    context: int = 1024
    """Let the model see this many tokens."""
    threads: int = 1
    """Use this many CPU threads in the server, in each host, and here."""
    uncached_runs: int = 1
    """Runs without a cache, of ten minutes each; there is no warm-up."""


def main(config: ServingBenchmark) -> None:
    """Measure, write, print."""
    names = chosen_cases(config.cases)
    adopt_orphans()
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    tell, rows = Teller(), list[Row]()
    with ExitStack() as stack:
        if names != [PROCESS]:
            with tell.busy(f"starting a coordinator, {HOSTS} hosts and a server"):
                swarm = stack.enter_context(served_smollm2(config.context, config.threads))
            over_swarm = {GENERATE: against_library, UNCACHED: against_whole_window}
            rows += [row for name in names if name in over_swarm for row in over_swarm[name](swarm, config, tell)]
    if PROCESS in names:
        rows += against_process(config, tell)
    config.publish("serving", rows, notes(config))


def chosen_cases(names: str) -> list[str]:
    """By name, in the order of CASES; SystemExit naming the known ones for any other."""
    if unknown := set(names.split(",")) - set(CASES):
        raise SystemExit(f"--cases: {', '.join(sorted(unknown))!r} is not known; known: {', '.join(CASES)}")
    return [name for name in CASES if name in names.split(",")]


def against_library(swarm: ServedSwarm, config: ServingBenchmark, tell: Teller) -> list[Row]:
    """What is served, against what the model without adapters writes in this process."""
    rows = list[Row]()
    for streams in STREAMS:
        asked, n_tokens = swarm.prompts(streams, config.prompt_tokens), streams * config.tokens
        ours = {CPU: swarm.cpu_s, HOSTS_CPU: swarm.hosts_cpu_s}
        contenders = {
            OURS: Contender(partial(over_http, swarm.url, asked, config.tokens), n_tokens, ours),
            LIBRARY: Contender(
                partial(generated, swarm.seed, asked, config.tokens), n_tokens, {CPU: time.process_time}
            ),
        }
        alternate(contenders, config.runs, tell)
        rows += library_rows(case_of("SmolLM2", streams, config), contenders, TARGETS[streams])
    return rows


def library_rows(case: str, contenders: Mapping[str, Contender], target: float) -> list[Row]:
    """Rows of one number of streams: three comparisons, and what the hosts alone took."""
    ours, theirs = contenders[OURS], contenders[LIBRARY]
    rows = [
        compare(case, metric, ours.figures(metric), LIBRARY, theirs.figures(metric)) for metric in (RATE, FIRST, CPU)
    ]
    rows[0] = replace(rows[0], note=target_of(target))
    return [*rows, not_compared(case, HOSTS_CPU, ours.figures(HOSTS_CPU), "-", "")]


def against_whole_window(swarm: ServedSwarm, config: ServingBenchmark, tell: Teller) -> list[Row]:
    """One stream, against the same model over the same hosts that reads all of the window for every token."""
    asked = swarm.prompts(1, config.prompt_tokens)
    ours = Contender(partial(over_http, swarm.url, asked, config.tokens), config.tokens)
    alternate({OURS: ours}, config.runs, tell)
    theirs = list[float]()
    while len(theirs) < config.uncached_runs:
        with tell.busy(f"{WHOLE_WINDOW}: {config.tokens} tokens"):
            theirs.append(rate_of(without_cache, swarm.model, asked, config.tokens))
        tell(f"{WHOLE_WINDOW} {theirs[-1]:,.1f}")
    row = compare(case_of("SmolLM2", 1, config), RATE, ours.figures(RATE), WHOLE_WINDOW, theirs)
    return [replace(row, note="; ".join(filter(None, (row.note, target_of(UNCACHED_TARGET)))))]


def target_of(ratio: float) -> str:
    """What stands beside a row that is to have at least this ratio."""
    return f"target of the ratio: {ratio:g}"


class FirstToken(BaseStreamer):
    """When the library has the first token of all streams, which comes after their prompts."""

    def __init__(self) -> None:
        self._arrived_s = list[float]()

    @property
    def at_s(self) -> float:
        """A time of time.perf_counter()."""
        return self._arrived_s[1]

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts, then a token of each stream."""
        self._arrived_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


@torch.no_grad()
def generated(model: Any, asked: Sequence[Sequence[int]], n_tokens: int) -> Timing:
    """One round of a model of the library; SystemExit where it writes less than that."""
    ids_BT = torch.tensor(asked)
    first, started_s = FirstToken(), time.perf_counter()
    # Neither side stops where the model would end a text.
    written_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=n_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=first,
    )
    took_s = time.perf_counter() - started_s
    if written_BT.shape[1] != ids_BT.shape[1] + n_tokens:
        raise SystemExit(f"transformers.generate wrote {written_BT.shape[1] - ids_BT.shape[1]} of {n_tokens} tokens")
    return Timing(first_s=first.at_s - started_s, rate=len(ids_BT) * n_tokens / took_s)


def against_process(config: ServingBenchmark, tell: Teller) -> list[Row]:
    """A small model of bytes over HTTP, against the same without a server."""
    rows, model = list[Row](), new_model(config.context)
    with server_of(model, config) as url:
        for streams in STREAMS:
            asked, n_tokens = prompts(streams), streams * config.tokens
            contenders = {
                OURS: Contender(partial(over_http, url, asked, config.tokens), n_tokens),
                IN_PROCESS: Contender(partial(in_process, model, asked, config.tokens), n_tokens),
            }
            alternate(contenders, config.runs, tell)
            figures = {name: contender.figures for name, contender in contenders.items()}
            case = case_of("small model", streams, config)
            rows += [
                compare(case, metric, figures[OURS](metric), IN_PROCESS, figures[IN_PROCESS](metric))
                for metric in (RATE, FIRST)
            ]
    return rows


@contextmanager
def server_of(model: Trunk, config: ServingBenchmark) -> Iterator[str]:
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


def in_process(model: Trunk, asked: Sequence[Sequence[int]], n_tokens: int) -> Timing:
    """The same texts in one batch, without a server."""
    greedy = GenerationConfig(max_new_tokens=n_tokens, temperature=0.0)
    started_s = time.perf_counter()
    generation = Generation(model, [Prompt(ids=ids, config=greedy) for ids in asked])
    next(generation)
    first_s = time.perf_counter() - started_s
    for _ in generation:
        pass
    return Timing(first_s=first_s, rate=len(asked) * n_tokens / (time.perf_counter() - started_s))


def case_of(model: str, streams: int, config: ServingBenchmark) -> str:
    """The name of a row's case."""
    return f"{model}, {streams} x {config.tokens} tokens, context {config.context}"


def notes(config: ServingBenchmark) -> tuple[str, ...]:
    """What was measured."""
    threads = f"{config.threads} CPU thread" + "s" * (config.threads > 1)
    return (
        f"SmolLM2: SmolLM2-135M-Instruct in fp32, after prompts of {config.prompt_tokens} tokens",
        f"{EXPERTS:,} adapters on {HOSTS} hosts, 8 of them for each token in each of 4 layers; the library has none",
        f"server, hosts and the library have {threads} each, the small model's server and its clients share {threads}",
        "processor time: of the server and of the hosts with their p2pd, all threads, with what they do beside it",
        "small model: 2 layers, D=128, experts in the benchmark's process, after prompts of one token",
        "greedy; tokens of all streams together; first token: mean of streams",
        "the clients are in the benchmark's process: elsewhere they leave the server more of the machine",
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(ServingBenchmark))
    except ConfigError as error:  # SmolLM2 is not installed
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)

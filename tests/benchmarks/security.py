"""python -m tests.benchmarks.security --json runs/bench/security.json

What TLS and signatures cost a call: two nodes in one process over loopback, calls of 64 bytes and of 1 MB that are sent
back, encrypted and signed against `insecure_local`, which is neither. Medians of runs that take turns.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import tyro
import uvloop

from node.rpc.server import NodeServer
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.security import Security
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
    from typing import Any

METHOD = "/kilohive.benchmark.Echo/Echo"
SIZES = {"64 bytes": (64, 1000), "1 MB": (1 << 20, 60)}
"""Bytes of a call, and calls of a run."""
SECURE, PLAIN = "TLS, signed", "plain, unsigned"
METRIC = "ms per call"
CONNECT_TIMEOUT_S = 10.0
NOTES = ("one call after the other over one connection, both ends in one process, each byte sent and received",)


@dataclass(frozen=True, kw_only=True)
class SecurityBenchmark(RunsConfig):
    """Milliseconds of a call."""


def main(config: SecurityBenchmark) -> None:
    """Measure, write, print."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        contenders: dict[str, Callable[[], float]] = {}
        try:
            for kind, insecure in ((SECURE, False), (PLAIN, True)):
                call = runner.run(stack.enter_async_context(echo(insecure=insecure)))
                for size, (n_bytes, n_calls) in SIZES.items():
                    contenders[name_of(kind, size)] = timed(runner, call, bytes(n_bytes), n_calls)
            figures = alternate(contenders, config.runs, Teller())
        finally:
            runner.run(stack.aclose())
    config.publish("security", rows_of(figures), NOTES)


@asynccontextmanager
async def echo(*, insecure: bool) -> AsyncIterator[Callable[[bytes], Coroutine[Any, Any, None]]]:
    """A call to a node that sends back what it gets."""

    async def answer(raw: bytes, _: object) -> bytes:
        return raw

    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Echo": grpc.unary_unary_rpc_method_handler(answer)}
    host = Security(Identity.generate(), insecure_local=insecure)
    caller = Security(Identity.generate(), insecure_local=insecure).caller()
    name = METHOD.split("/")[1]
    server = NodeServer((grpc.method_handlers_generic_handler(name, handlers),), (), "127.0.0.1", 0, host)
    await server.start()
    address = Address(host.identity.peer_id, server.endpoint)
    try:
        async with await caller.open(address, CONNECT_TIMEOUT_S) as channel:
            method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)

            async def call(raw: bytes) -> None:
                await method(raw, metadata=caller.metadata(address, METHOD))

            yield call
    finally:
        await server.drain(0)


def timed(
    runner: asyncio.Runner, call: Callable[[bytes], Coroutine[Any, Any, None]], raw: bytes, n_calls: int
) -> Callable[[], float]:
    """Milliseconds of each of some calls, one after the other."""

    async def calls() -> float:
        started_s = time.perf_counter()
        for _ in range(n_calls):
            await call(raw)
        return 1000 * (time.perf_counter() - started_s) / n_calls

    return lambda: runner.run(calls())


def name_of(kind: str, size: str) -> str:
    """One contender."""
    return f"{size}, {kind}"


def rows_of(figures: Mapping[str, Sequence[float]]) -> list[Row]:
    """Each size."""
    return [
        compare(size, METRIC, figures[name_of(SECURE, size)], PLAIN, figures[name_of(PLAIN, size)]) for size in SIZES
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(SecurityBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

"""Calls to a host whose owner limits it: counted, slowed down, refused, over real gRPC."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2

from common.errors import DrainingError, KilohiveError
from node.limits.limits import Limits
from node.limits.rate_limits import CALL_BYTES, OVERHEAD, RateLimits
from node.rpc.handlers import CallCounts, unary
from node.rpc.rate_limit_interceptor import RateLimitInterceptor
from node.rpc.server import NodeServer
from protocol import expert_pb2 as pb
from tests.support.channels import plain_aio_channel
from tests.support.swarm_parts import PLAIN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NAME = "kilohive.test.Echo"
TIMEOUT_S = 20.0
TEXT = "x" * 100_000


class Echo:
    """A server behind an admission, and a client's side of it."""

    def __init__(self, rate_limits: RateLimits, channel: grpc.aio.Channel) -> None:
        self.rate_limits, self.channel = rate_limits, channel
        self.refusal: KilohiveError | None = None

    async def call(self, timeout_s: float = TIMEOUT_S) -> None:
        request = pb.DescribeRequest(run_id=TEXT).SerializeToString()
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(f"/{NAME}/Echo")
        await method(request, timeout=timeout_s)


@asynccontextmanager
async def echo(limits: Limits, max_calls: int | None = None) -> AsyncIterator[Echo]:
    async def answer(request: pb.DescribeRequest, timeout_s: float) -> pb.DescribeRequest:
        return request

    rate_limits = RateLimits(limits)
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Echo": grpc.unary_unary_rpc_method_handler(unary(pb.DescribeRequest, answer, CallCounts()))
    }
    handler = grpc.method_handlers_generic_handler(NAME, methods)
    admission = RateLimitInterceptor(rate_limits, lambda: host.refusal, max_calls)
    server = NodeServer([handler], [NAME], "127.0.0.1", 0, PLAIN, admission)
    await server.start()
    try:
        async with plain_aio_channel(server.endpoint) as channel:
            host = Echo(rate_limits, channel)
            yield host
    finally:
        await server.drain(0)


async def test_both_ways_are_counted_with_their_headers() -> None:
    async with echo(Limits()) as host:
        await host.call()
        assert host.rate_limits.received_bytes == host.rate_limits.sent_bytes
        assert len(TEXT) < host.rate_limits.received_bytes < (len(TEXT) + CALL_BYTES + 10) * OVERHEAD


async def test_callers_that_come_faster_than_the_limit_wait() -> None:
    async with echo(Limits(down_bytes_per_s=500_000)) as host:
        await asyncio.gather(*(host.call() for _ in range(8)))
        # Of 0.83 MB the first half is on credit; the last of the calls has waited for the rest.
        assert host.rate_limits.received(0) == pytest.approx(0.0, abs=0.05)


async def test_a_caller_that_cannot_wait_so_long_is_told_when_to_come_again() -> None:
    async with echo(Limits(down_bytes_per_s=500_000)) as host:
        host.rate_limits.received(2_000_000)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await host.call(timeout_s=4.0)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "this host's owner limits it: it rests for 4." in str(caught.value.details())
        retry_ms = dict(caught.value.trailing_metadata() or ())["kilohive-retry-after-ms"]
        assert 3000 < int(retry_ms) < 5000


async def test_a_refusal_ends_calls_but_not_the_health_check() -> None:
    async with echo(Limits()) as host:
        host.refusal = DrainingError("this host is paused")
        with pytest.raises(grpc.aio.AioRpcError, match="this host is paused"):
            await host.call()
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = host.channel.unary_unary("/grpc.health.v1.Health/Check")
        answer = health_pb2.HealthCheckResponse.FromString(await check(b"", timeout=TIMEOUT_S))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_host_with_little_memory_takes_fewer_calls_at_once() -> None:
    async with echo(Limits(down_bytes_per_s=500_000), max_calls=2) as host:
        host.rate_limits.received(1_500_000)  # so that each waits for two seconds and more
        calls = await asyncio.gather(*(host.call() for _ in range(6)), return_exceptions=True)
        refused = [call for call in calls if isinstance(call, grpc.aio.AioRpcError)]
        assert [call.code() for call in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4

"""The gRPC server of a node: its services, standard health and reflection, bounded; TLS and signed calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.errors import ConfigError
from node.rpc.auth_interceptor import AuthInterceptor
from protocol.limits import MAX_MESSAGE_BYTES
from protocol.security import KEEPALIVE_MS
from protocol.status import REASON_KEY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.rpc.rate_limit_interceptor import RateLimitInterceptor
    from protocol.security import Security

    Context = grpc.aio.ServicerContext[Any, Any]

MAX_CONCURRENT_CALLS = 64
"""gRPC holds a whole message before we see it: this many times MAX_MESSAGE_BYTES is the most that callers can take."""
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two nodes on one port would share its calls without a word.
    ("grpc.so_reuseport", 0),
    # Callers ask whether this node is there while they wait for it; more often than this is too often.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
)


class HealthWithReason(health.aio.HealthServicer):
    """Standard health; an answer that is not SERVING brings along why, which the protocol has no field for."""

    problem = ""

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:  # noqa: N802 - gRPC's name
        """Answer, with the reason in the trailing metadata."""
        if self.problem:
            context.set_trailing_metadata(((REASON_KEY, self.problem.encode("ascii", "replace").decode()),))
        return await super().Check(request, context)


class NodeServer:
    """Owns the gRPC server of one node and the health of its services; `endpoint` is host:port once started."""

    def __init__(
        self,
        handlers: Sequence[grpc.GenericRpcHandler],
        service_names: Sequence[str],
        address: str,
        port: int,
        security: Security,
        admission: RateLimitInterceptor | None = None,
    ) -> None:
        security.check_listen(address)
        checker = security.checker()
        # A caller that is not let in is not counted either.
        in_front = (AuthInterceptor(checker) if checker else None, admission)
        self._server = grpc.aio.server(
            options=OPTIONS,
            maximum_concurrent_rpcs=(admission and admission.max_calls) or MAX_CONCURRENT_CALLS,
            interceptors=[one for one in in_front if one is not None],
        )
        self._credentials = security.server_credentials()
        self._health = HealthWithReason()
        self._server.add_generic_rpc_handlers(tuple(handlers))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = tuple(service_names)
        reflection.enable_server_reflection((*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._address, self._port = address, port
        self.endpoint = ""

    async def start(self) -> None:
        """Listen; raises ConfigError when the port is taken."""
        where = f"{_bracketed(self._address)}:{self._port}"
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(where)
            else:
                port = self._server.add_secure_port(where, self._credentials)
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {where}: the port is in use or the address is not this machine's; "
                "choose another with --port or --listen"
            ) from None
        await self._server.start()
        self.endpoint = f"{_bracketed(self._address)}:{port}"
        await self.report("")

    async def report(self, problem: str) -> None:
        """Say NOT_SERVING and why, or SERVING if `problem` is empty."""
        self._health.problem = problem
        status = health_pb2.HealthCheckResponse
        for name in ("", *self._names):
            await self._health.set(name, status.NOT_SERVING if problem else status.SERVING)

    async def drain(self, grace_s: float) -> None:
        """Say NOT_SERVING, refuse new calls, give the running ones `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address

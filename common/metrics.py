"""Serving Prometheus metrics, whoever collects them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server

from common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.registry import Collector

JOIN_TIMEOUT_S = 2.0


@contextmanager
def serve_metrics(collector: Collector, address: str, port: int, *, setting: str = "--metrics-port") -> Iterator[None]:
    """Serve `/metrics` while the context lasts; port 0 serves nothing. Raises ConfigError, which names `setting`."""
    if not port:
        yield
        return
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise ConfigError(f"{setting}: cannot listen on {address}:{port}: {error.strerror}") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(JOIN_TIMEOUT_S)

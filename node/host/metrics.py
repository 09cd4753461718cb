"""A host in numbers: Prometheus metrics, read from the runtime when scraped, and the `load` event."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from node.host.events import LoadEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    from node.host.availability import Availability
    from node.host.serving.runtime import Runtime
    from node.host.serving.service import ExpertService
    from node.limits.rate_limits import RateLimits


class HostCollector(Collector):
    """Counters and gauges of one host; `exchanged_bytes` counts what averaging and downloads moved, both ways."""

    def __init__(
        self,
        runtime: Runtime,
        service: ExpertService,
        availability: Availability,
        exchanged_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._runtime, self._service, self._availability = runtime, service, availability
        self._exchanged_bytes = exchanged_bytes

    def collect(self) -> Iterator[Metric]:
        """Current values."""
        runtime, service = self._runtime, self._service
        yield GaugeMetricFamily("kilohive_queue_tokens", "Tokens waiting for the runtime", runtime.queue_tokens)
        yield GaugeMetricFamily("kilohive_kept_inputs_bytes", "Memory kept for backward", runtime.kept_bytes)
        yield GaugeMetricFamily("kilohive_tokens_per_second", "Recent forward tokens per second", runtime.tokens_per_s)
        yield CounterMetricFamily("kilohive_tokens", "Forward tokens since the start", runtime.tokens_total)
        yield CounterMetricFamily("kilohive_calls_ok", "Calls answered", service.calls_ok)
        yield CounterMetricFamily("kilohive_calls_refused", "Calls refused with an error", service.calls_refused)
        staleness = "Recent mean of the optimizer steps between forward and backward"
        yield GaugeMetricFamily("kilohive_gradient_staleness", staleness, runtime.staleness)
        yield CounterMetricFamily("kilohive_steps_refused", "Gradients too late to step", runtime.steps_refused)
        n_bytes = self._exchanged_bytes() if self._exchanged_bytes else 0
        yield CounterMetricFamily("kilohive_exchanged_bytes", "Bytes of averaging and downloads, both ways", n_bytes)
        versions = GaugeMetricFamily("kilohive_block_version", "Optimizer steps of a block", labels=["layer", "block"])
        for block_id, block in runtime.blocks.items():
            versions.add_metric([str(block_id.layer), str(block_id.block)], block.version)
        yield versions
        held = self._availability.held
        yield GaugeMetricFamily("kilohive_working", "Whether nothing keeps the host from working", not held)
        words = "Since when a reason keeps the host from working, in seconds since 1970"
        since = GaugeMetricFamily("kilohive_paused_since_timestamp_seconds", words, labels=["reason"])
        for one in held:
            since.add_metric([one.name], one.since_s)
        yield since


def load_event(runtime: Runtime, rate_limits: RateLimits, exchanged_bytes: int, memory_bytes: int) -> LoadEvent:
    """What the host does and uses now."""
    return LoadEvent(
        tokens_per_s=round(runtime.tokens_per_s, 1),
        tokens_total=runtime.tokens_total,
        queue_tokens=runtime.queue_tokens,
        kept_inputs_bytes=runtime.kept_bytes,
        refused=runtime.refused,
        staleness=round(runtime.staleness, 3),
        steps_refused=runtime.steps_refused,
        exchanged_bytes=exchanged_bytes,
        sent_bytes=rate_limits.sent_bytes,
        received_bytes=rate_limits.received_bytes,
        cpu_s=round(rate_limits.cpu_s, 2),
        memory_bytes=memory_bytes,
    )

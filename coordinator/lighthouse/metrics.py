"""Prometheus metrics of a lighthouse: what it does, and what the run looks like from it; read when scraped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from coordinator.lighthouse.observer import RunView


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One look at a lighthouse; `calls` are those that it has answered, by kind."""

    run: RunView
    calls: Mapping[str, int]
    connections: int
    members: int
    records: int
    reservations: int
    circuits: int
    relayed_bytes: int
    refused: int


class LighthouseCollector(Collector):
    """Turns figures into metrics; `figures` is called in the server's thread, and only reads."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Current values."""
        now = self._figures()
        yield _by("kilohive_run_peers", "Peers of the run by role", "role", now.run.peers)
        yield _by("kilohive_run_blocks", "Blocks of the run: lost, few or full", "replicas", now.run.n_blocks)
        yield GaugeMetricFamily("kilohive_lighthouse_connections", "Connected peers", now.connections)
        yield GaugeMetricFamily("kilohive_lighthouse_members", "Members of the DHT that are known", now.members)
        yield GaugeMetricFamily("kilohive_lighthouse_records", "Records kept for others", now.records)
        yield GaugeMetricFamily("kilohive_relay_reservations", "Peers that can be reached here", now.reservations)
        yield GaugeMetricFamily("kilohive_relay_circuits", "Circuits that are open", now.circuits)
        yield CounterMetricFamily("kilohive_relay_bytes", "Bytes relayed, both ways", now.relayed_bytes)
        yield _by("kilohive_dht_calls", "Calls answered by kind", "kind", now.calls, CounterMetricFamily)
        yield CounterMetricFamily("kilohive_lighthouse_refused", "What was over a limit or made no sense", now.refused)


def _by(name: str, words: str, label: str, values: Mapping[str, int], kind: Any = GaugeMetricFamily) -> Metric:  # noqa: ANN401
    family: Metric = kind(name, words, labels=[label])
    for value, number in dict(values).items():
        family.add_metric([value], number)  # type: ignore[attr-defined]
    return family

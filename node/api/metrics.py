"""A server in numbers: Prometheus metrics, read when scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from node.api.batch import ContinuousBatch
    from node.api.served_model import ServedModel


class ServingCollector(Collector):
    """Counters and gauges of one server; `answered` counts its answers by path and status."""

    def __init__(self, served: ServedModel, batch: ContinuousBatch, answered: Counter[tuple[str, int]]) -> None:
        self._served, self._batch, self._answered = served, batch, answered

    def collect(self) -> Iterator[Metric]:
        """Current values."""
        batch, count = self._batch, self._served.experts.count()
        yield GaugeMetricFamily("kilohive_experts_alive", "Experts that can be called", count.n_live)
        yield GaugeMetricFamily("kilohive_texts_running", "Texts that are being written", batch.n_running)
        yield GaugeMetricFamily("kilohive_texts_waiting", "Texts that wait for their turn", batch.n_waiting)
        yield CounterMetricFamily("kilohive_prompt_tokens", "Tokens of prompts that were begun", batch.tokens_read)
        yield CounterMetricFamily("kilohive_written_tokens", "Tokens that were written", batch.tokens_written)
        yield CounterMetricFamily("kilohive_written_steps", "Passes through the model", batch.steps)
        answers = CounterMetricFamily("kilohive_http_answers", "Answers by path and status", labels=["path", "status"])
        for (path, status), n in sorted(self._answered.items()):
            answers.add_metric([path, str(status)], n)
        yield answers

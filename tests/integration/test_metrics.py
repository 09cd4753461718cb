from __future__ import annotations

import urllib.request

import pytest

from common import metrics
from common.errors import ConfigError
from common.metrics import serve_metrics
from node.host.availability import Availability, Reason
from node.host.metrics import HostCollector
from tests.support.ports import free_port
from tests.support.swarm_parts import running_swarm, small_manifest


def test_metrics_are_served_as_prometheus_text_and_a_taken_port_is_one_sentence() -> None:
    port = free_port()
    with running_swarm(small_manifest(), n_hosts=1) as swarm:
        availability = Availability(now_s=lambda: 1000.5)
        availability.tell(Reason.PROGRAM, "steam runs")
        collector = HostCollector(swarm.hosts[0].runtime, swarm.hosts[0].service, availability)
        with serve_metrics(collector, "127.0.0.1", port):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
            with (
                pytest.raises(ConfigError, match=rf"--metrics-port: cannot listen on 127\.0\.0\.1:{port}"),
                serve_metrics(collector, "127.0.0.1", port),
            ):
                pass
            with (
                pytest.raises(ConfigError, match=r"^metrics_port: cannot listen on 127\.0\.0\.1"),
                serve_metrics(collector, "127.0.0.1", port, setting="metrics_port"),
            ):
                pass
    assert 'kilohive_block_version{block="3",layer="1"} 0.0' in text
    assert "kilohive_queue_tokens 0.0" in text
    assert "kilohive_working 0.0" in text
    assert 'kilohive_paused_since_timestamp_seconds{reason="program"} 1000.5' in text
    assert "steam" not in text, "others may read it"


def test_port_0_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(metrics, "start_http_server", asked.append)
    with running_swarm(small_manifest(), n_hosts=1) as swarm:
        host = swarm.hosts[0]
        with serve_metrics(HostCollector(host.runtime, host.service, Availability()), "127.0.0.1", 0):
            assert asked == []

"""python -m tests.benchmarks.wire --json runs/bench/wire.json

What a token costs on the wire: bytes that the sockets of a trainer, two hosts and a coordinator send, forward and
backward together, for each token of one MoE layer (D=512, K=8), by codec. Medians of several runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from tests.benchmarks.contenders import Case, ours
from tests.benchmarks.meters import SocketMeter
from tests.benchmarks.report import Row, RunsConfig, Teller, compare
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from protocol.manifest import Codec

HOSTS = 2
LIMIT_BYTES = 5300.0
METRIC = "bytes on the socket, per token and layer"
CODECS: tuple[Codec, ...] = ("int8", "bf16", "fp32")
CASE = Case(key="wire", experts=64, d_model=512, hidden=64, tokens=4096, hosts=(2,), steps=2, experts_per_token=8)
NOTES = ("payload of TCP, both ways: messages, HTTP/2's frames, and what the DHT says meanwhile",)


@dataclass(frozen=True, kw_only=True)
class WireBenchmark(RunsConfig):
    """Bytes per token and layer."""


def main(config: WireBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    tell = Teller()
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder:
        figures = {codec: measure(codec, Path(folder) / codec, config.runs, tell) for codec in CODECS}
    config.publish("wire", rows_of(figures), NOTES)


def measure(codec: Codec, folder: Path, runs: int, tell: Teller) -> list[float]:
    """Bytes per token of each run, after one that makes the connections. Bytes need no turns: they do not take time."""
    case = replace(CASE, codec=codec)
    with tell.busy(f"{codec}: starting a coordinator and {HOSTS} hosts"):
        swarm = ours(case, HOSTS, folder)
    with swarm as run:
        run()
        meter, figures = SocketMeter([os.getpid()]), []
        for number in range(1, runs + 1):
            before = meter.read()
            run()
            figures.append((meter.read() - before) / case.run_tokens)
            tell(f"{codec}: run {number} of {runs}, {figures[-1]:,.0f} bytes per token")
    return figures


def rows_of(figures: dict[Codec, list[float]]) -> list[Row]:
    """int8 against its limit, and against each of the others."""
    name, small = f"D={CASE.d_model}, K={CASE.experts_per_token}, {HOSTS} hosts, int8", figures["int8"]
    others = (compare(name, METRIC, small, codec, figures[codec]) for codec in CODECS if codec != "int8")
    return [compare(name, METRIC, small, "limit", [LIMIT_BYTES] * len(small)), *others]


if __name__ == "__main__":
    try:
        main(tyro.cli(WireBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

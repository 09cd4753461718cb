"""python -m tests.benchmarks.codec --json runs/bench/codec.json

Tensors to bytes and back, checks included, in one thread: ours against hivemind's compression of the nearest kind, and
both against what a plain copy of the bytes takes. MB are of the float32 tensor. Medians of runs that take turns.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import tyro
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto.runtime_pb2 import CompressionType

from protocol import expert_pb2 as pb
from protocol.tensors import TensorSpec, decode, encode
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from protocol.manifest import Codec

SHAPE = (4096, 512)
REPEATS = 10
MB = 1e6
METRIC = "MB/s, encoded and decoded"
COPY = "a copy of the bytes"
PEERS: dict[Codec, int] = {
    "fp32": CompressionType.NONE,
    "fp16": CompressionType.FLOAT16,
    "int8": CompressionType.FLOAT16,
}
"""hivemind's 8-bit codecs cannot read back what they wrote with numpy 2: int8 stands beside its smallest that can."""
NOTES = (f"{SHAPE[0]:,} x {SHAPE[1]} float32, {REPEATS} times in a run, 1 thread; through the message's bytes",)


@dataclass(frozen=True, kw_only=True)
class CodecBenchmark(RunsConfig):
    """Speed of the tensor codecs."""


def main(config: CodecBenchmark) -> None:
    """Measure, write, print."""
    torch.set_num_threads(1)
    x_TD = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    contenders: dict[str, Callable[[], float]] = {COPY: timed(lambda: bytes(bytearray(x_TD.numpy().tobytes())))}
    for codec, kind in PEERS.items():
        contenders[name_of(codec)] = ours(codec, x_TD)
        contenders[peer_of(codec)] = theirs(kind, x_TD)
    figures = alternate(contenders, config.runs, Teller())
    config.publish("codec", rows_of(figures), NOTES)


def name_of(codec: Codec) -> str:
    """Ours."""
    return f"{codec}, {SHAPE[0]:,} x {SHAPE[1]}"


def peer_of(codec: Codec) -> str:
    """hivemind's of the same kind."""
    return f"hivemind {CompressionType.Name(PEERS[codec])}"


def ours(codec: Codec, x_TD: torch.Tensor) -> Callable[[], float]:
    """MB/s through a message of the wire."""
    spec = TensorSpec(field="x", shape=SHAPE)

    def there_and_back() -> torch.Tensor:
        return decode(pb.Tensor.FromString(encode(x_TD, codec).SerializeToString()), spec, torch.float32)

    return timed(there_and_back)


def theirs(kind: int, x_TD: torch.Tensor) -> Callable[[], float]:
    """MB/s through hivemind's message."""

    def there_and_back() -> object:
        message = serialize_torch_tensor(x_TD, kind)
        return deserialize_torch_tensor(type(message).FromString(message.SerializeToString()))

    return timed(there_and_back)


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """MB of the tensor per second of `function`."""

    def run() -> float:
        started = time.perf_counter()
        for _ in range(REPEATS):
            function()
        return REPEATS * SHAPE[0] * SHAPE[1] * torch.float32.itemsize / MB / (time.perf_counter() - started)

    return run


def rows_of(figures: Mapping[str, Sequence[float]]) -> list[Row]:
    """Each of ours against hivemind's and against the copy."""
    rows = []
    for codec in PEERS:
        name = name_of(codec)
        rows += [compare(name, METRIC, figures[name], other, figures[other]) for other in (peer_of(codec), COPY)]
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(CodecBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

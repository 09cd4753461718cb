"""python -m tests.benchmarks.hivemind_averager --index 0 --peers 4 --blocks 1

One peer of hivemind's DecentralizedAverager, for `averaging.py` to compare with, as a user would run it: this process,
its DHT's process, p2pd and the averager's process. Commands are lines on standard input: `reset SEED` fills the
tensors, `go` takes one step of averaging, `stop` is answered at once; at the end of input it leaves with every process
that it started. Each `go` is answered by `averaging` when the tensors begin to move, `sample`, and `stepped`.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import hivemind
import torch
import tyro
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.control import AveragingStage

from tests.benchmarks.averaging_parts import (
    BLOCK_SHAPE,
    BLOCK_TENSORS,
    Answers,
    sampled,
    start_tensors,
    values_per_tensor,
)
from tests.benchmarks.peer_process import end_descendants, private_stdout
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.benchmarks.averaging_parts import Floats

PREFIX = "block"
MATCHMAKING_S = 5.0
"""hivemind's default: how long a group that is not full waits for others. A full one begins at once."""
REQUEST_TIMEOUT_S = 3.0
"""hivemind's default."""
NEXT_CHUNK_TIMEOUT_S = MATCHMAKING_S
"""hivemind's averager waits for ever by default; this is what hivemind.Optimizer gives it."""
STEP_TIMEOUT_S = 60.0
POLL_S = 0.002


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """One of `peers` that all average with each other."""

    index: int
    peers: int
    blocks: int
    """Whose tensors are averaged, all together."""
    allreduce_timeout_s: float = 60.0
    """hivemind's averager waits for ever by default; this is what hivemind.Optimizer gives it."""
    initial_peers: tuple[str, ...] = ()
    """Addresses of the first peer's DHT; none: this is the first."""


def main(config: PeerConfig) -> None:
    """Obey lines until standard input ends."""
    adopt_orphans()
    answers = Answers(private_stdout())
    torch.set_num_threads(1)
    try:
        dht = _dht(config.initial_peers)
        answers.say("up", [str(address) for address in dht.get_visible_maddrs()])
        averager = _averager(dht, config)
        answers.say("ready")
        _obey(averager, config, answers)
        averager.shutdown()
        dht.shutdown()
    finally:
        end_descendants()


def _dht(initial_peers: tuple[str, ...]) -> hivemind.DHT:
    dht = hivemind.DHT(start=True, initial_peers=list(initial_peers))
    _mend(dht)
    return dht


def _averager(dht: hivemind.DHT, config: PeerConfig) -> DecentralizedAverager:
    tensors = [torch.zeros(BLOCK_SHAPE) for _ in range(config.blocks * BLOCK_TENSORS)]
    averager = DecentralizedAverager(
        tensors,
        dht,
        start=True,
        prefix=PREFIX,
        target_group_size=config.peers,
        min_matchmaking_time=MATCHMAKING_S,
        request_timeout=REQUEST_TIMEOUT_S,
        allreduce_timeout=config.allreduce_timeout_s,
        next_chunk_timeout=NEXT_CHUNK_TIMEOUT_S,
    )
    _mend(averager)
    return averager


def _mend(process: hivemind.DHT | DecentralizedAverager) -> None:
    """Make the pipe into the process blocking again; see `hivemind_peer.py` for how it dies otherwise."""
    os.set_blocking(process._inner_pipe.fileno(), True)


def _obey(averager: DecentralizedAverager, config: PeerConfig, answers: Answers) -> None:
    seed = 0
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "reset":
            seed = int(argument)
            _fill(averager, start_tensors(config.blocks, seed, config.index))
            answers.say_sample(seed, _sampled(averager, config.blocks))
            answers.say("reset")
        elif command == "go":
            _step(averager, config, answers, seed)
        elif command == "stop":
            answers.say("stopped")
        else:
            raise SystemExit(f"unknown command: {command!r}")


def _fill(averager: DecentralizedAverager, values: Iterator[Floats]) -> None:
    with averager.get_tensors() as tensors:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(torch.from_numpy(value))


def _sampled(averager: DecentralizedAverager, blocks: int) -> Floats:
    with averager.get_tensors() as tensors:
        return sampled((tensor.numpy() for tensor in tensors), values_per_tensor(blocks))


def _step(averager: DecentralizedAverager, config: PeerConfig, answers: Answers, seed: int) -> None:
    step = averager.step(wait=False, timeout=STEP_TIMEOUT_S)
    told = False
    while not step.done():
        if not told and step.stage == AveragingStage.RUNNING_ALLREDUCE:
            answers.say("averaging")
            told = True
        time.sleep(POLL_S)
    answers.say_sample(seed, _sampled(averager, config.blocks))
    problem = step.exception()
    answers.say("stepped", "" if problem is None else repr(problem))


if __name__ == "__main__":
    main(tyro.cli(PeerConfig))

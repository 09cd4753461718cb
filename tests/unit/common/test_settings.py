from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import ConfigError
from common.settings import check_minimums
from node.host.command import run_host
from node.host.config import MINIMUMS as HOST_MINIMUMS
from node.host.config import HostConfig
from node.trainer.config import EvaluateConfig, SampleConfig, TrainConfig
from node.trainer.evaluation import run_evaluate
from node.trainer.sample_command import run_sample
from node.trainer.trainer import MINIMUMS as TRAIN_MINIMUMS
from node.trainer.trainer import run_trainer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

NOWHERE = Path("/nowhere/swarm.toml")


def test_the_defaults_pass() -> None:
    check_minimums(HostConfig(), HOST_MINIMUMS)
    check_minimums(TrainConfig(), TRAIN_MINIMUMS)


@pytest.mark.parametrize(
    ("run", "config", "problem"),
    [
        (run_host, HostConfig(swarm=NOWHERE, threads=0), "--threads: must be 1 or more, is 0"),
        (run_host, HostConfig(swarm=NOWHERE, checkpoint_every_s=float("nan")), "checkpoint_every_s: must be 0.1"),
        (run_trainer, TrainConfig(swarm=NOWHERE, micro_batches=0), "--micro-batches: must be 1 or more, is 0"),
        (run_trainer, TrainConfig(swarm=NOWHERE, save_every=0), "--save-every: must be 1 or more"),
        (run_trainer, TrainConfig(swarm=NOWHERE, shard=2, n_shards=2), "--shard: must be below --n-shards 2, is 2"),
        (run_evaluate, EvaluateConfig(swarm=NOWHERE, batch=0), "--batch: must be 1 or more, is 0"),
        (run_sample, SampleConfig(swarm=NOWHERE, temperature=-1.0), "--temperature: must be 0 or more, is -1"),
        (run_sample, SampleConfig(swarm=NOWHERE, top_k=-1), "--top-k: must be 0 or more, is -1"),
        (run_sample, SampleConfig(swarm=NOWHERE, top_p=0.0), "--top-p: must be more than 0 and at most 1, is 0"),
        (run_sample, SampleConfig(swarm=NOWHERE, n=10**9), "--n: must be at most 1024, is 1000000000"),
        (run_sample, SampleConfig(swarm=NOWHERE, stop=("a", "")), "--stop: is empty"),
        (run_sample, SampleConfig(swarm=NOWHERE, stop=("a\udcff",)), "--stop: is not UTF-8"),
    ],
)
async def test_a_number_below_its_minimum_is_one_sentence_before_anything_starts(
    run: Callable[[Any, asyncio.Event], Awaitable[None]], config: object, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        await run(config, asyncio.Event())

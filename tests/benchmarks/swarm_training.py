"""A model trained over host processes, for benchmarks that compare what it came to: its speed and its held-out loss."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coordinator.blocks import block_list_text, split_blocks
from experiments.live.faulty_client import Faults, FaultyClient
from experiments.live.processes import process_swarm
from node.membership.config import SwarmConfig
from node.model.transformer import bits_per_byte
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.swarm_client import SwarmClient
from node.trainer.train_step import Training, build_trunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.errors import TooFewExpertsError
    from node.data import TextDataset
    from node.trainer.train_step import StepConfig
    from protocol.manifest import Manifest
    from tests.benchmarks.report import Teller

HOSTS = 2
START_TIMEOUT_S, CALL_TIMEOUT_S = 120.0, 60.0
WAIT_S = 0.05
TOLD_EVERY_S = 10.0
HELD_OUT_BYTES = 65_536
LOSS = "held-out bits per byte"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run: `case` is its name, for whoever watches."""

    case: str
    manifest: Manifest
    steps: StepConfig
    n_steps: int
    faults: Faults


@dataclass(frozen=True)
class Outcome:
    """What one run came to; `in_flight` micro-batches in its last step."""

    tokens_per_s: float
    bits_per_byte: float
    calls_failed: int
    in_flight: int


def train_over_hosts(plan: Plan, dataset: TextDataset, tell: Teller) -> Outcome:
    """Train over fresh hosts that share the blocks of every layer; faults end before the held-out loss is measured."""
    with (
        client_of_hosts(plan.manifest, plan.faults) as client,
        training_over(client, plan.steps, dataset) as training,
    ):
        return _train(client, training, plan, tell)


@contextmanager
def client_of_hosts(manifest: Manifest, faults: Faults) -> Iterator[SwarmClient]:
    """A client of fresh hosts that are up, and share the blocks of every layer."""
    with (
        tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder,
        process_swarm(Path(folder), manifest) as swarm,
    ):
        for index, blocks in enumerate(split_blocks(manifest.model, HOSTS, 1)):
            swarm.host(f"host-{index}", block_list_text(blocks))
        with SwarmClient(
            SwarmConfig(swarm=swarm.swarm_file),
            DispatchConfig(call_timeout_s=CALL_TIMEOUT_S, seed=manifest.seed),
            make_client=partial(FaultyClient, faults),
        ) as client:
            client.wait_for_all_blocks(START_TIMEOUT_S)
            yield client


@contextmanager
def training_over(client: SwarmClient, steps: StepConfig, dataset: TextDataset) -> Iterator[Training]:
    """A trainer with a fresh trunk."""
    manifest = client.manifest
    generator = torch.Generator().manual_seed(manifest.seed)
    layers = [client.moe_layer(layer, generator) for layer in range(manifest.model.n_layers)]

    def wait(_: TooFewExpertsError) -> None:
        client.dispatcher.wait_for_change(WAIT_S)

    model = build_trunk(manifest, layers, generator)
    training = Training(manifest, model, client.dispatcher, dataset, steps, wait)
    try:
        yield training
    finally:
        training.close()


def _train(client: SwarmClient, training: Training, plan: Plan, tell: Teller) -> Outcome:
    """The first step, in which everything is met for the first time, is not counted in the speed."""
    result = training.step()
    seconds, told_s = 0.0, 0.0
    for step in range(2, plan.n_steps + 1):
        result = training.step()
        seconds += result.seconds
        if seconds - told_s > TOLD_EVERY_S or step == plan.n_steps:
            told_s, speed = seconds, (step - 1) * training.tokens_per_step / seconds
            tell(f"{plan.case}: step {step} of {plan.n_steps}, {speed:,.0f} tokens/s, {result.loss:.3f} nats")
    failed = client.dispatcher.calls_failed
    _end_faults(client)
    return Outcome(
        tokens_per_s=(plan.n_steps - 1) * training.tokens_per_step / seconds,
        bits_per_byte=bits_per_byte(training.evaluate(HELD_OUT_BYTES)),
        calls_failed=failed,
        in_flight=result.in_flight,
    )


def _end_faults(client: SwarmClient) -> None:
    if isinstance(client.client, FaultyClient):
        client.client.faults = Faults()
    client.wait_for_all_blocks(START_TIMEOUT_S)

"""python -m tests.benchmarks.averaged_rates --json runs/bench/averaged_rates.json

What training apart costs, and what larger steps give back: two trainers over two replicas of every expert, all in this
process, without a network or its delays, against one trainer over one of each, after the same tokens. Each at several
learning rates: a rule that makes up for averaging must do so whatever the rate it begins with.
`--tokens 60000 --seeds 1` is a quick look.

Trunks meet every `--trunk-every` steps, each block once in `--block-every` steps on average, by the product's own
arithmetic (`node/averaging/gossip.py`); a micro-batch finds each block at one of its replicas, drawn at random.

Shapes: R rows of a replica.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path  # noqa: TC003 - tyro reads the annotation
from typing import TYPE_CHECKING

import torch
import tyro

from common.folders import data_cache
from node.averaging.gossip import GossipLimits, Move, apply_move, share_R
from node.data import open_dataset
from node.model.experts.state import block_state
from node.model.moe import LocalExperts
from node.model.transformer import bits_per_byte
from node.trainer.train_step import StepConfig, Training, build_model
from node.trainer.trunk_replica import TrunkReplica
from protocol.manifest import TRUNK, Manifest, OptimizerConfig, all_blocks
from tests.benchmarks.report import Row, Teller, compare, document, publish

if TYPE_CHECKING:
    from common.errors import TooFewExpertsError
    from node.data import TextDataset
    from node.model.experts.block import Block
    from node.model.replica_state import ReplicaState
    from protocol.manifest import BlockId

FULL_TOKENS, FULL_SEEDS = 819_200, 3
HELD_OUT_BYTES = 65_536
WAIT_S = 60.0
TOLD_EVERY = 50
LOSS = "held-out bits per byte"
NOTES = (
    "medians over seeds; the default manifest: 2 layers x 512 experts in blocks of 32, D=128; Wikipedia's text",
    "one trainer has 8 sequences in a micro-batch, each of two has 4; two micro-batches make a step",
    "all in one process: no delays, no stale gradients, no network; seconds are not compared",
)


@dataclass(frozen=True, kw_only=True)
class RatesBenchmark:
    """Held-out loss of two averaged trainers by learning rate, against one trainer."""

    json: Path
    """File for the rows."""
    tokens: int = FULL_TOKENS
    """Of each run, all trainers together."""
    seeds: int = FULL_SEEDS
    """How many, from 0 on."""
    trunk_every: int = 4
    """Steps between two meetings of the trunks."""
    block_every: int = 4
    """Steps between two meetings of a block's replicas, on average."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train: so many trainers, over as many replicas, with rates that many times the manifest's."""

    name: str
    copies: int
    trunk_rate: float = 1.0
    expert_rate: float = 1.0

    def manifest(self, tokens: int, seed: int) -> Manifest:
        """With this arm's rates."""
        optimizer = OptimizerConfig(total_tokens=tokens)
        rates = replace(optimizer, lr=optimizer.lr * self.trunk_rate, expert_lr=optimizer.expert_lr * self.expert_rate)
        return Manifest(name="bench", seed=seed, optimizer=rates)


ONE = Arm(name="1 trainer, 1 replica", copies=1)
ONE_FURTHER = Arm(name="1 trainer, 1 replica, trunk's rate x 1.41", copies=1, trunk_rate=math.sqrt(2))
TWO = (
    Arm(name="2 trainers, 2 replicas", copies=2),
    Arm(name="2 trainers, 2 replicas, trunk's rate x 1.41", copies=2, trunk_rate=math.sqrt(2)),
    Arm(name="2 trainers, 2 replicas, both rates x 1.41", copies=2, trunk_rate=math.sqrt(2), expert_rate=math.sqrt(2)),
    Arm(name="2 trainers, 2 replicas, trunk's rate x 2", copies=2, trunk_rate=2.0),
)


class Replicas(LocalExperts):
    """Every block so many times; what a trainer sends to a block goes to one of them, drawn at random."""

    def __init__(self, manifest: Manifest, copies: int) -> None:
        super().__init__(manifest)
        self._copies = [self.blocks, *(LocalExperts(manifest).blocks for _ in range(copies - 1))]
        self._learnt_R: dict[BlockId, list[torch.Tensor]] = {}
        self._random = random.Random(manifest.seed)

    def blocks_for_call(self, layer: int) -> list[Block]:
        """One replica of each."""
        of_layer = zip(*(blocks[layer] for blocks in self._copies), strict=True)
        return [self._random.choice(replicas) for replicas in of_layer]

    def of_block(self, block_id: BlockId) -> list[Block]:
        """Its replicas."""
        return [blocks[block_id.layer][block_id.block] for blocks in self._copies]

    @torch.no_grad()
    def meet(self, block_id: BlockId) -> None:
        """The replicas of a block exchange."""
        if len(self._copies) == 1:
            return
        states = [block_state(block) for block in self.of_block(block_id)]
        before = self._learnt_R.get(block_id, [torch.zeros_like(state.learnt_R) for state in states])
        self._learnt_R[block_id] = [state.learnt_R.clone() for state in states]
        exchange(self.manifest, block_id, (states[0], states[1]), (before[0], before[1]))


def exchange(
    manifest: Manifest,
    block_id: BlockId,
    states: tuple[ReplicaState, ReplicaState],
    before: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """What two nodes do to their replicas, moments included; `before` is what they had learnt when they last met."""
    limits = GossipLimits.from_manifest(manifest, block_id)
    works = [state.learnt_R - learnt_R for state, learnt_R in zip(states, before, strict=True)]
    copies = [state.copy() for state in states]
    for own, other in ((0, 1), (1, 0)):
        there, here = copies[other], copies[own]
        move = Move(
            delta={name: p - here.params[name] for name, p in there.params.items()},
            alpha_R=share_R(works[own], works[other]),
            first=there.first,
            second=there.second,
            steps_R=there.steps_R,
            version=there.version,
        )
        apply_move(states[own], move, limits)


class Trunks:
    """The trainers' trunks."""

    def __init__(self, manifest: Manifest, trainings: list[Training]) -> None:
        self._manifest, self._replicas = manifest, [TrunkReplica(training) for training in trainings]
        self._learnt_R = [torch.zeros(1, dtype=torch.float64) for _ in trainings]

    def meet(self) -> None:
        """They exchange, between steps, if there are two."""
        if len(self._replicas) == 2:
            one, other = self._replicas
            one.call(lambda mine: other.call(lambda theirs: self._exchange(mine, theirs)).result(WAIT_S)).result(WAIT_S)

    def _exchange(self, mine: ReplicaState, theirs: ReplicaState) -> None:
        before = (self._learnt_R[0], self._learnt_R[1])
        self._learnt_R = [mine.learnt_R.clone(), theirs.learnt_R.clone()]
        exchange(self._manifest, TRUNK, (mine, theirs), before)


def new_training(manifest: Manifest, experts: Replicas, dataset: TextDataset, steps: StepConfig) -> Training:
    """A trainer without a swarm."""
    generator = torch.Generator().manual_seed(manifest.seed)
    return Training(manifest, build_model(manifest, experts, generator), experts, dataset, steps, give_up)


def give_up(error: TooFewExpertsError) -> None:
    """All experts are here."""
    raise error


def step_of(training: Training, step: int, n_trainers: int) -> float:
    """Loss, in nats per byte, of one step of one of so many trainers that keep step."""
    training.run_tokens = (step - 1) * n_trainers * training.tokens_per_step
    return training.step().loss


def train(arm: Arm, config: RatesBenchmark, seed: int, tell: Teller) -> float:
    """Held-out bits per byte of the first trainer, once all have met for the last time."""
    manifest = arm.manifest(config.tokens, seed)
    dataset = open_dataset(None, cache_dir=data_cache(), seed=seed)
    experts, rng = Replicas(manifest, arm.copies), random.Random(seed)
    steps = StepConfig(batch=8 // arm.copies, micro_batches=2, n_shards=arm.copies, seed=seed)
    trainings = [new_training(manifest, experts, dataset, replace(steps, shard=shard)) for shard in range(arm.copies)]
    trunks, blocks = Trunks(manifest, trainings), all_blocks(manifest.model)
    n_steps = config.tokens // (arm.copies * trainings[0].tokens_per_step)
    try:
        for step in range(1, n_steps + 1):
            losses = [step_of(training, step, arm.copies) for training in trainings]
            last = step == n_steps
            if last or step % config.trunk_every == 0:
                trunks.meet()
            for block_id in blocks:
                if last or rng.random() * config.block_every < 1:
                    experts.meet(block_id)
            if last or step % TOLD_EVERY == 0:
                tell(f"{arm.name}, seed {seed}: step {step} of {n_steps}, {losses[0] / math.log(2):.3f} bits per byte")
        return bits_per_byte(trainings[0].evaluate(HELD_OUT_BYTES))
    finally:
        for training in trainings:
            training.close()


def main(config: RatesBenchmark) -> None:
    """Measure, write, print."""
    torch.set_num_threads(1)
    tell = Teller()
    figures: dict[str, list[float]] = {}
    for seed in range(config.seeds):
        for arm in (ONE, ONE_FURTHER, *TWO):
            figures.setdefault(arm.name, []).append(train(arm, config, seed, tell))
            tell(f"{arm.name}, seed {seed}: held-out {figures[arm.name][-1]:.3f} bits per byte")
    quick = config.tokens < FULL_TOKENS or config.seeds < FULL_SEEDS
    notes = (*NOTES, f"{config.tokens:,} tokens, {config.seeds} seed(s): not for the docs") if quick else NOTES
    publish(config.json, document("averaged_rates", rows_of(figures), notes))


def rows_of(figures: dict[str, list[float]]) -> list[Row]:
    """Each arm of two against the one at the manifest's rate; the largest against the one that steps further, too."""
    ones, further = figures[ONE.name], figures[ONE_FURTHER.name]
    return [
        *(compare(arm.name, LOSS, figures[arm.name], ONE.name, ones) for arm in TWO),
        compare(TWO[-1].name, LOSS, figures[TWO[-1].name], ONE_FURTHER.name, further),
        compare(ONE_FURTHER.name, LOSS, further, ONE.name, ones),
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(RatesBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

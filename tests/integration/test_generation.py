"""A text over real hosts: one that dies in mid-sentence costs a failover, or a wait, and not the sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import TooFewExpertsError
from common.tokenizer import ByteTokenizer
from node.model.moe import LocalExperts
from node.model.next_token import GenerationConfig
from node.trainer.sampling import sample_text
from node.trainer.train_step import build_transformer
from protocol.manifest import all_blocks
from tests.support.swarm_parts import running_swarm, small_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from node.model.generation import Generation
    from node.model.moe import Experts
    from node.model.transformer import Transformer
    from node.trainer.sampling import NewTokens
    from tests.support.swarm_parts import TestSwarm

MODEL = {"gate": "hash", "gate_reads": "tokens", "gate_score": "softmax", "smear": 2}
MANIFEST = small_manifest(dtype="fp64", codec="fp64", model=MODEL)
CONFIG = GenerationConfig(max_new_tokens=24, seed=1)
FAILS_AT = 8


def model_over(experts: Experts) -> Transformer:
    return build_transformer(MANIFEST, experts, torch.Generator().manual_seed(MANIFEST.seed)).eval()


class Writing:
    """`until_enough` that does something before the step FAILS_AT, and something when too few experts answer."""

    def __init__(self, before: Callable[[], object], on_too_few: Callable[[], object]) -> None:
        self._before, self._on_too_few = before, on_too_few
        self.steps = self.failures = 0

    def until_enough(self, step: Callable[[Generation], NewTokens], generation: Generation) -> NewTokens:
        self.steps += 1
        if self.steps == FAILS_AT:
            self._before()
        while True:
            try:
                return step(generation)
            except TooFewExpertsError:
                self.failures += 1
                self._on_too_few()


@pytest.fixture
def swarm() -> Iterator[TestSwarm]:
    with running_swarm(MANIFEST, n_hosts=1) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def undisturbed() -> str:
    writing = Writing(lambda: None, lambda: None)
    return sample_text(model_over(LocalExperts(MANIFEST)), ByteTokenizer(), b"The ", CONFIG, writing.until_enough)


def test_a_dead_host_costs_a_failover_where_others_have_its_experts(swarm: TestSwarm, undisturbed: str) -> None:
    swarm.add_host("other", all_blocks(MANIFEST.model))
    writing = Writing(swarm.hosts[0].stop, lambda: None)
    assert (
        sample_text(model_over(swarm.dispatcher), ByteTokenizer(), b"The ", CONFIG, writing.until_enough) == undisturbed
    )
    assert writing.steps == CONFIG.max_new_tokens
    assert writing.failures == 0


def test_a_dead_host_costs_a_wait_where_nobody_else_has_its_experts(swarm: TestSwarm, undisturbed: str) -> None:
    def another_comes() -> None:
        if len(swarm.hosts) == 1:
            swarm.add_host("other", all_blocks(MANIFEST.model))

    writing = Writing(swarm.hosts[0].stop, another_comes)
    assert (
        sample_text(model_over(swarm.dispatcher), ByteTokenizer(), b"The ", CONFIG, writing.until_enough) == undisturbed
    )
    assert writing.steps == CONFIG.max_new_tokens
    assert writing.failures > 0

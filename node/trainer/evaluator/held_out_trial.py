"""One offered expert on trial: held-out windows in an order that nobody can know, until the test knows. No sockets."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import numpy as np

from node.trainer.evaluator.paired_experts import window_gains
from node.trainer.evaluator.sequential_test import SequentialTest, SequentialTestConfig

if TYPE_CHECKING:
    from node.data import TextDataset
    from node.model.trunk import Trunk
    from node.trainer.evaluator.sequential_test import Decision
    from protocol.manifest import ModelConfig

MAX_WINDOWS = 1024
"""The most held-out windows: an offer that does not show its gain within them is refused."""

WORTH_OF_LAYER = 3e-3
"""Nats per byte that a layer would gain if each of its experts brought what is just worth having."""

ALPHA = 0.05
"""Probability that any of all the offers that an evaluator ever tries is accepted, of those that gain nothing."""


def config_of(model: ModelConfig, number: int) -> SequentialTestConfig:
    """Return the test of offer `number`, from 1. The shares of ALPHA add up to it, however many there will be."""
    share = 6.0 / (np.pi * number) ** 2
    return SequentialTestConfig(alpha=ALPHA * share, worth=WORTH_OF_LAYER / model.experts_per_layer)


class HeldOutTrial:
    """Runs `model` (of `paired_experts_model`) over held-out text, `batch` windows at once, each with both experts."""

    def __init__(self, model: Trunk, dataset: TextDataset, config: SequentialTestConfig, batch: int) -> None:
        """Raises InvalidInputError if the text has no more windows than the test's pilot."""
        self._model, self._dataset, self._batch = model, dataset, batch
        n_windows = dataset.n_held_out(model.context)
        self._test = SequentialTest(config, n_windows)
        order = np.random.default_rng(secrets.randbits(128))
        self._left_N = order.permutation(n_windows)[:MAX_WINDOWS]
        self.of_windows = len(self._left_N)

    @property
    def is_over(self) -> bool:
        """Whether the test knows, or has had as many windows as it gets."""
        return self._test.is_decided or not len(self._left_N)

    def go_on(self) -> Decision:
        """One more batch, and what is known then."""
        numbers_B, self._left_N = self._left_N[: self._batch], self._left_N[self._batch :]
        ids = self._dataset.held_out_windows(numbers_B, self._model.context)
        for gain in window_gains(self._model, ids):
            if self._test.is_decided:
                break
            self._test.add(gain)
        return self._test.decision()


def refusal(decision: Decision) -> str:
    """Why an offer is not taken in, for a person."""
    if decision.verdict == "undecided":
        return f"no gain was found in {decision.n_windows} held-out windows"
    if decision.high < 0.0:
        return f"it is worse than the present expert: {decision.why}"
    return f"no gain was found: {decision.why}"

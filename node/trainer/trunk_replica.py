"""The trunk as a replica of one row, so that averaging and downloads treat it like any block of experts.

Shapes: R rows (always 1), ... a parameter's own shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from common.errors import InvalidInputError
from node.averaging.pieces import PARAMS
from node.model.gate import GATE_BIAS
from node.model.replica_state import ReplicaState, TensorSchema, schema
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from node.model.trunk import Trunk
    from node.trainer.train_step import Training
    from protocol.manifest import BlockId

R = TypeVar("R")

_FIRST, _SECOND, _STEP = "exp_avg", "exp_avg_sq", "step"
"""What torch.optim.AdamW calls its moments and its count."""


def trunk_weights(model: Trunk) -> tuple[TensorSchema, ...]:
    """What a download of this trunk's weights alone must hold: the parameters that are trained, the gates' biases."""
    trained, balanced = _learnt(model)
    named = sorted({**trained, **balanced}.items())
    return tuple(TensorSchema(f"{PARAMS}{name}", (1, *t.shape), t.dtype) for name, t in named)


class TrunkReplica:
    """A training's trunk, its gates' biases and AdamW's moments as an `AveragedReplica`.

    `learnt_R` is what this training has put into the trunk as it is now: a resumed trainer that takes over a newer
    trunk than its checkpoint's must not claim the work of its former life once more.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._trained, self._balanced = _learnt(training.model)
        self._own_tokens_at_load = 0
        for parameter in self._trained.values():
            self._adam(parameter)

    @property
    def id(self) -> BlockId:
        """`TRUNK`."""
        return TRUNK

    @property
    def version(self) -> int:
        """Optimizer steps that this trunk has taken, or took part of by averaging."""
        return self._training.version

    def schema(self) -> tuple[TensorSchema, ...]:
        """What a download of this trunk must hold. Shapes alone: safe in any thread."""
        return schema(self._state())

    def call(self, function: Callable[[ReplicaState], R]) -> Future[R]:
        """Run `function` on the live tensors between steps; see `AveragedReplica`."""
        return self._training.call(lambda: self._with_state(function))

    def look(self, function: Callable[[ReplicaState], R]) -> Future[R]:
        """Run `function` on the live tensors, which it must not change, also during a step; see `AveragedReplica`."""
        return self._training.look(lambda: function(self._state()))

    def load_state(self, state: ReplicaState) -> Future[None]:
        """Become `state`, which another trainer gave; what was learnt here before counts no more.

        The future fails with InvalidInputError, and nothing has changed, if names, shapes or types are not the run's.
        """

        def load(live: ReplicaState) -> None:
            if schema(state) != schema(live) or state.steps_R.shape != live.steps_R.shape:
                raise InvalidInputError("trunk", "has tensors of other names, shapes or types than this run's")
            given = state.named()
            for name, tensor in live.named().items():
                tensor.copy_(given[name])
            live.steps_R.copy_(state.steps_R)
            live.version = state.version
            self._own_tokens_at_load = self._training.own_tokens

        return self.call(load)

    @torch.no_grad()
    def _with_state(self, function: Callable[[ReplicaState], R]) -> R:
        state = self._state()
        steps = int(state.steps_R)
        result = function(state)
        self._training.version = state.version
        if int(state.steps_R) != steps:
            for parameter in self._trained.values():
                self._adam(parameter)[_STEP].fill_(float(state.steps_R))
        return result

    def _state(self) -> ReplicaState:
        adam = {name: self._adam(parameter) for name, parameter in self._trained.items()}
        steps = max(int(moments[_STEP]) for moments in adam.values())
        return ReplicaState(
            params={name: t.detach()[None] for name, t in {**self._trained, **self._balanced}.items()},
            first={name: moments[_FIRST][None] for name, moments in adam.items()},
            second={name: moments[_SECOND][None] for name, moments in adam.items()},
            steps_R=torch.tensor([steps], dtype=torch.int64),
            learnt_R=torch.tensor([self._training.own_tokens - self._own_tokens_at_load], dtype=torch.float64),
            version=self._training.version,
        )

    def _adam(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's state of a parameter; zeros, as AdamW itself would begin with, if it was not stepped yet."""
        moments: dict[str, torch.Tensor] = self._training.optimizer.state[parameter]
        if not moments:
            moments[_STEP] = torch.zeros(())
            moments[_FIRST] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            moments[_SECOND] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return moments


def _learnt(model: Trunk) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.Tensor]]:
    """Parameters that Adam steps, and biases of gates, which balance moves: a gate's memory of loads is not shared."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained, {name: b for name, b in model.named_buffers() if name.endswith(GATE_BIAS)}

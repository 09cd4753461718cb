"""A hosted block as averaging sees it: an `AveragedReplica` whose tensors belong to the runtime's thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from node.host.serving.hosted_blocks import not_hosted
from node.model.experts.state import block_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from node.host.serving.runtime import Runtime
    from node.model.experts.block import Block
    from node.model.replica_state import ReplicaState
    from protocol.manifest import BlockId

R = TypeVar("R")


class BlockReplica:
    """The block `block_id` of `runtime`, whichever object that is at the time of a call."""

    def __init__(self, runtime: Runtime, block_id: BlockId) -> None:
        self._runtime, self._id = runtime, block_id

    @property
    def id(self) -> BlockId:
        """Which block."""
        return self._id

    @property
    def version(self) -> int:
        """Optimizer steps taken; 0 once the block is no longer hosted."""
        block = self._runtime.blocks.get(self._id)
        return block.version if block else 0

    def call(self, function: Callable[[ReplicaState], R]) -> Future[R]:
        """Run `function` on the live tensors between batches; what it makes of `steps_R` and `version` holds.

        If it fails, the counters stay. Raises DrainingError; the future fails with NotHostedError.
        """
        return self._runtime.call(lambda: self._apply(function))

    def look(self, function: Callable[[ReplicaState], R]) -> Future[R]:
        """Run `function`, which changes nothing, between batches; see `AveragedReplica`. Fails like `call`."""
        return self._runtime.call(lambda: function(block_state(self._block())))

    def _block(self) -> Block:
        block = self._runtime.blocks.get(self._id)
        if block is None:
            raise not_hosted(self._id)
        return block

    def _apply(self, function: Callable[[ReplicaState], R]) -> R:
        block = self._block()
        state = block_state(block)
        result = function(state)
        block.adam.steps_E.copy_(state.steps_R)
        block.version = state.version
        return result

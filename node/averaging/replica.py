"""What averaging asks of a replica, be it a block on a host or the trunk on a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from node.model.replica_state import ReplicaState
    from protocol.manifest import BlockId
R = TypeVar("R")


class AveragedReplica(Protocol):
    """A block on a host, or the trunk on a trainer."""

    @property
    def id(self) -> BlockId:
        """Which block; `TRUNK` for the trunk."""

    @property
    def version(self) -> int:
        """Optimizer steps taken, readable anywhere."""

    def call(self, function: Callable[[ReplicaState], R]) -> Future[R]:
        """Run `function` on the live tensors, between batches or steps, on the thread that owns them.

        It may change tensors in place, and `steps_R`, `version` of the state it is given: they are written back.
        Raises DrainingError when the node is leaving; the future fails with NotHostedError when the block is gone.
        """

    def look(self, function: Callable[[ReplicaState], R]) -> Future[R]:
        """Run `function`, which changes nothing, on the live tensors, as soon as nothing changes them.

        A step of a trainer reads its trunk for most of its time: a look need not wait for it. Fails like `call`.
        """

"""Events of nodes that are a contract between processes: a local swarm reads them in the logs of its children.

They are here because `node`, which emits them, and `coordinator`, which reads them, may not import each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.events import Event


@dataclass(frozen=True, kw_only=True)
class TrainingStartEvent(Event):
    """A trainer has joined its run and begins to train; to a local swarm, that its hosts did come up."""

    event: ClassVar[str] = "start"

    run_id: str
    experts: int
    hosts: int
    step: int
    steps: int
    tokens_total: int
    parameters_trunk: int
    parameters_experts: int
    documents: int
    bytes_train: int

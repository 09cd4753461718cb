"""What a server needs of a model, wherever its experts are: in a swarm, or in this process.

Path of a request: app -> requests -> **served_model** -> batch -> generation, and back as answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from node.trainer.host_wait import PatientWait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.tokenizer import Tokenizer
    from node.api.chat import Chat
    from node.model.generation import Generation
    from node.model.trunk import Trunk
    from node.trainer.dispatch.dispatcher import Dispatcher
    from node.trainer.sampling import NewTokens, Step


@dataclass(frozen=True, kw_only=True)
class ExpertCount:
    """How many experts can be called now, in each layer, of how many in each."""

    live_by_layer: tuple[int, ...]
    per_layer: int

    @property
    def n_experts(self) -> int:
        """Experts of all layers."""
        return len(self.live_by_layer) * self.per_layer

    @property
    def n_live(self) -> int:
        """How many experts of all layers can be called."""
        return sum(self.live_by_layer)

    @property
    def is_enough(self) -> bool:
        """Whether a token can be written: every layer has an expert."""
        return all(self.live_by_layer)

    def __str__(self) -> str:
        if self.n_live == self.n_experts:
            return f"all {self.n_experts:,} experts have a host"
        return f"{self.n_experts - self.n_live:,} of {self.n_experts:,} experts have no host that answers"


class ServedExperts(Protocol):
    """The experts under a trunk, as a server sees them. Called from the thread that writes, `count` from any."""

    def until_enough(self, step: Step, generation: Generation) -> NewTokens:
        """`step(generation)`, again while too few experts answer; TooFewExpertsError if that takes too long."""

    def count(self) -> ExpertCount:
        """How many can be called now."""

    def take_answered(self) -> Mapping[str, int]:
        """How many (token, expert) pairs each peer has answered since the last call."""

    def close(self) -> None:
        """Give up what is under way: whoever waits for it gets DrainingError."""


class SwarmExperts:
    """The experts of a swarm; a host that is gone is waited for up to `timeout_s` seconds."""

    def __init__(self, dispatcher: Dispatcher, timeout_s: float) -> None:
        self._dispatcher = dispatcher
        self._wait = PatientWait(dispatcher, timeout_s)

    def until_enough(self, step: Step, generation: Generation) -> NewTokens:
        """Try `step(generation)` again while hosts come back; see `PatientWait.until_enough`."""
        return self._wait.until_enough(step, generation)

    def count(self) -> ExpertCount:
        """Count experts whose block has a replica that is not avoided."""
        model = self._dispatcher.manifest.model
        live = tuple(int(self._dispatcher.live_experts(layer).sum()) for layer in range(model.n_layers))
        return ExpertCount(live_by_layer=live, per_layer=model.experts_per_layer)

    def take_answered(self) -> Mapping[str, int]:
        """Count the pairs that each peer, by its id, has answered since the last call."""
        return self._dispatcher.take_pairs_by_peer()

    def close(self) -> None:
        """Give up what is under way, the wait for a host too."""
        self._dispatcher.close()


class ExpertsInProcess:
    """Experts that are always there: those of a model that has left its swarm."""

    def __init__(self, n_layers: int, per_layer: int) -> None:
        self._count = ExpertCount(live_by_layer=(per_layer,) * n_layers, per_layer=per_layer)

    def until_enough(self, step: Step, generation: Generation) -> NewTokens:
        """Compute the step once: it cannot find too few experts."""
        return step(generation)

    def count(self) -> ExpertCount:
        """Count all experts, as none can be away."""
        return self._count

    def take_answered(self) -> Mapping[str, int]:
        """Name no peer, as none is called."""
        return {}

    def close(self) -> None:
        """Do nothing, as nothing is under way elsewhere."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model in evaluation mode, what its tokens are, and how a chat becomes a text.

    `name` is what requests call it; `created_s` is in seconds since 1970.
    """

    name: str
    model: Trunk
    tokenizer: Tokenizer
    experts: ServedExperts
    chat: Chat
    created_s: int

"""What every trunk is, whatever is inside: tokens in, logits of the next token out, with MoE layers given from outside.

Path of a step: data -> **trunk** -> gate -> dispatch -> hosts, and back.
"""

# Shapes: B sequences, T positions, V vocabulary, R sequences that a pass reads.

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from node.model.attention_cache import Stretch


class Trunk(nn.Module):
    """A model of `vocab_size` tokens that reads up to `context` of them.

    Its MoE layers are among its modules; `parameters()` are what is trained, `state_dict()` is what a checkpoint holds.
    """

    context: int
    vocab_size: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def unfrozen(self) -> Mapping[str, nn.Parameter]:
        """What is trained of a pretrained model inside, by the names that it has there; of other trunks nothing."""
        return {}

    @abstractmethod
    def forward(self, ids_BT: Tensor) -> Tensor:
        """Integer ids_BT in [0, V), T <= context -> logits_BTV. InvalidInputError when T does not fit the context."""

    @abstractmethod
    def new_cache(self, n_places: int, n_positions: int) -> Any:  # noqa: ANN401 - the KeptSequences that `read` takes
        """Room for so many sequences of up to so many tokens, all of it free; LimitExceededError for too many."""

    @abstractmethod
    def bytes_per_sequence(self, n_positions: int) -> int:
        """What is kept of one sequence of so many tokens."""

    @abstractmethod
    def read(self, cache: Any, stretches: Sequence[Stretch]) -> Tensor:  # noqa: ANN401 - of `new_cache`
        """Logits [R, V] of what follows each stretch; a pass in which the experts raise an error can be repeated."""

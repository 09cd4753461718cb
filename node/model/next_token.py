"""Which token comes next: by temperature, among the likeliest, from a generator of the sequence's own. No sockets."""

# Shapes: V vocabulary.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.errors import DivergedError, InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

NOT_FINITE = "the model's logits are not finite: take a checkpoint from before its training diverged"

SEEDS = range(-(1 << 63), 1 << 64)
"""What a torch.Generator takes."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How one sequence goes on, in ids; texts that end it are the business of whoever turns ids into text.

    temperature: divides the logits; 0 always takes the likeliest token.
    top_k: draw among so many of the likeliest tokens; 0 among all.
    top_p: draw among the fewest likeliest tokens that have this probability together ("The Curious Case of Neural Text
        Degeneration", Holtzman et al., arXiv 1904.09751); 1 among all. Probabilities are those after temperature and
        top_k.
    stop: the sequence ends with the first of these runs of ids that it has written.
    seed: of the sequence's own generator.
    n_likeliest: so many of the likeliest tokens are told beside each that is written.

    InvalidInputError names a field that is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    n_likeliest: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidInputError("temperature", f"is {self.temperature}; it takes 0 or more")
        if not 0 < self.top_p <= 1:
            raise InvalidInputError("top_p", f"is {self.top_p}; it takes more than 0 and at most 1")
        for name in ("max_new_tokens", "top_k", "n_likeliest"):
            if getattr(self, name) < 0:
                raise InvalidInputError(name, f"is {getattr(self, name)}; it takes 0 or more")
        if not all(self.stop):
            raise InvalidInputError("stop", "holds an empty run of ids, which would end every sequence at once")
        if self.seed not in SEEDS:
            raise InvalidInputError("seed", f"is {self.seed}; it takes {SEEDS.start} to {SEEDS.stop - 1}")


def probabilities(logits_V: Tensor, config: GenerationConfig) -> Tensor:
    """What the next token is drawn by, [V], for finite logits and a temperature above 0; 0 for what is left out.

    Of tokens that are as likely as each other the first comes first, so that never more than top_k are kept.
    """
    # The largest is 0 whatever the temperature, so that none is so low that a quotient would have no number.
    probability_V = torch.softmax((logits_V - logits_V.max()) / config.temperature, dim=0)
    if not config.top_k and config.top_p == 1:
        return probability_V
    likeliest = probability_V.sort(descending=True, stable=True)
    values_V = likeliest.values.clone()
    if config.top_k:
        values_V[config.top_k :] = 0
        values_V /= values_V.sum()
    # A token is needed as long as those before it have less together: the first always is.
    before_V = values_V.cumsum(0) - values_V
    if config.top_p < 1:
        values_V[before_V >= config.top_p] = 0
    return torch.zeros_like(values_V).scatter(0, likeliest.indices, values_V / values_V.sum())


def choose(logits_V: Tensor, config: GenerationConfig, generator: torch.Generator) -> tuple[int, float]:
    """The next token and its log-probability (nats), which is the model's, before temperature, top_k and top_p.

    It is computed on the CPU in float64, so that a seeded CPU generator gives the same tokens on any device. Raises
    DivergedError where a logit is not finite.
    """
    logits_V = logits_V.detach().cpu().double()
    if not bool(torch.isfinite(logits_V).all()):
        raise DivergedError(NOT_FINITE)
    if config.temperature == 0:
        token = int(logits_V.argmax())
    else:
        token = int(torch.multinomial(probabilities(logits_V, config), 1, generator=generator))
    return token, float(torch.log_softmax(logits_V, dim=0)[token])


def likeliest(logits_V: Tensor, n: int) -> tuple[tuple[int, float], ...]:
    """The `n` likeliest tokens, the likeliest first, each with the model's log-probability (nats)."""
    log_probability_V = torch.log_softmax(logits_V.detach().cpu().double(), dim=0)
    found = log_probability_V.topk(min(n, len(log_probability_V)))
    return tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))

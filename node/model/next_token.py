"""Which token comes next: by temperature, among the likeliest, from a generator of the sequence's own. No sockets."""

# Shapes: V vocabulary, N tokens of it, the likeliest first.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.errors import DivergedError, InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

NOT_FINITE = "the model's logits are not finite: take a checkpoint from before its training diverged"

LIKELIEST_AT_FIRST = 1024
"""Nearly always top_p is reached among so many tokens, and finding them costs a fraction of sorting a vocabulary."""

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
    token_N = _candidates(probability_V, config)
    values_N = probability_V[token_N]
    if config.top_k:
        values_N[config.top_k :] = 0
        values_N /= values_N.sum()
    # A token is needed as long as those before it have less together: the first always is.
    before_N = values_N.cumsum(0) - values_N
    if config.top_p < 1:
        values_N[before_N >= config.top_p] = 0
    return torch.zeros_like(probability_V).scatter(0, token_N, values_N / values_N.sum())


def _candidates(probability_V: Tensor, config: GenerationConfig) -> Tensor:
    """The likeliest tokens, in their order, and of those that are as likely the first one first: all that are kept."""
    n = config.top_k or LIKELIEST_AT_FIRST
    if n < len(probability_V):
        least = probability_V.topk(n).values[-1]
        token_N = _in_order(probability_V, (probability_V >= least).nonzero()[:, 0])
        if config.top_k or float(probability_V[token_N].cumsum(0)[-1]) >= config.top_p:
            return token_N
    return _in_order(probability_V, torch.arange(len(probability_V)))


def _in_order(probability_V: Tensor, token_N: Tensor) -> Tensor:
    return token_N[probability_V[token_N].argsort(descending=True, stable=True)]


def _drawn(probability_V: Tensor, generator: torch.Generator) -> int:
    """A token, each as often as it is likely, by one number of the generator; none whose probability is 0."""
    cumulative_V = probability_V.cumsum(0)
    whole = cumulative_V[-1]
    at = whole * torch.rand((), dtype=cumulative_V.dtype, generator=generator)
    at = torch.minimum(at, torch.nextafter(whole, torch.zeros_like(whole)))  # a product may be rounded up to the whole
    return int(torch.searchsorted(cumulative_V, at, right=True))


def is_finite(logits_V: Tensor) -> bool:
    """Whether every logit is: NaN and infinities show in the extremes, which are found in a tenth of the time."""
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(logits_V))


def choose(logits_V: Tensor, config: GenerationConfig, generator: torch.Generator) -> tuple[int, float]:
    """The next token and its log-probability (nats), which is the model's, before temperature, top_k and top_p.

    It is computed on the CPU in float64, so that a seeded CPU generator gives the same tokens on any device. Raises
    DivergedError where a logit is not finite.
    """
    logits_V = logits_V.detach().cpu().double()
    if not is_finite(logits_V):
        raise DivergedError(NOT_FINITE)
    token = int(logits_V.argmax()) if config.temperature == 0 else _drawn(probabilities(logits_V, config), generator)
    return token, float(torch.log_softmax(logits_V, dim=0)[token])


def likeliest(logits_V: Tensor, n: int) -> tuple[tuple[int, float], ...]:
    """The `n` likeliest tokens, the likeliest first, each with the model's log-probability (nats)."""
    log_probability_V = torch.log_softmax(logits_V.detach().cpu().double(), dim=0)
    found = log_probability_V.topk(min(n, len(log_probability_V)))
    return tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))

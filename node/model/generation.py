"""Generation: many sequences in one batch, a token each at a time, over what they have read before. No sockets.

Path of a token: next_token -> **generation** -> attention_cache -> transformer -> gate -> dispatch -> hosts, and back.
It knows ids only; `node/trainer/sampling.py` turns text into ids and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from common.errors import DivergedError, InvalidInputError
from node.model.attention_cache import Stretch
from node.model.next_token import NOT_FINITE, GenerationConfig, choose, is_finite, likeliest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from torch import Tensor

    from node.model.attention_cache import KeptSequences
    from node.model.trunk import Trunk

TOKENS_AT_ONCE = 4096
"""Tokens of all sequences that one pass through the model reads: long prompts are read in several."""

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sequence to go on from, at least one id, and how it goes on."""

    ids: Sequence[int]
    config: GenerationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class NewToken:
    """The next token of the sequence that goes on from prompt `sequence`, counted from 0.

    log_probability: in nats, as the model has it, before temperature, top_k and top_p.
    likeliest: `n_likeliest` tokens with their log-probabilities, the likeliest first.
    finish: why it is the sequence's last one, if it is: it completes a `stop`, or is the max_new_tokens-th.
    """

    sequence: int
    token: int
    log_probability: float
    likeliest: tuple[tuple[int, float], ...] = ()
    finish: Finish | None


class Generation:
    """An iterator of steps, each with a new token for every sequence that goes on; those that are finished drop out.

    A sequence that has more to read than a step does has no new token in it, and keeps nobody waiting. Others may be
    added between two steps, as long as there is room.

    No sequence has a part in another's arithmetic, and each draws from a generator of its own, so that what it says
    does not depend on what else is in the batch (but for rounding, where products of more rows add up in another
    order). A step calls each layer once, with the new tokens of all sequences together; a pretrained model's more often
    where some have far more to read than others.

    The model never sees more than its context. A sequence that reaches it loses the older half of what it has, and the
    rest is read again as a new window, so that a token costs at most two on average. Of a prompt that is longer than
    the context the end is read.

    A step that raises TooFewExpertsError leaves everything as it was before it: the next step tries again. So does one
    that raises DivergedError, which names the sequences that cannot go on: `finish` lets the others. Experts that come
    and go between steps change what is written from then on; what was read stays as it was read.

    The caller chooses `eval()`; switching it here would change the mode under threads that train.
    """

    def __init__(
        self,
        model: Trunk,
        prompts: Sequence[Prompt] = (),
        tokens_at_once: int = TOKENS_AT_ONCE,
        room: int | None = None,
    ) -> None:
        """`room` is for how many sequences there is memory, whatever they ask for; if not given, for `prompts` alone.

        InvalidInputError for a prompt that has no ids or unknown ones; LimitExceededError for too many prompts.
        """
        self._model, self._tokens_at_once = model, tokens_at_once
        self._n_asked, self._sequences = 0, list[_Sequence]()
        for prompt in prompts:
            _check(prompt, model.vocab_size)
        asked = [of for of in prompts if of.config.max_new_tokens]
        # The last token that is written is never read.
        longest = max((min(len(of.ids), model.context) + of.config.max_new_tokens - 1 for of in asked), default=1)
        n_positions = model.context if room is not None else min(model.context, longest)
        self._cache: KeptSequences = model.new_cache(len(asked) if room is None else room, n_positions)
        for prompt in prompts:
            self.add(prompt)

    @property
    def is_done(self) -> bool:
        """Whether every sequence is finished."""
        return not self._sequences

    @property
    def n_free(self) -> int:
        """How many more sequences there is room for."""
        return self._cache.n_places - self._cache.n_sequences

    def add(self, prompt: Prompt) -> int:
        """Begin a sequence at the next step, and return its number; one that is to write nothing is finished at once.

        InvalidInputError for a prompt that has no ids or unknown ones; LimitExceededError if there is no room.
        """
        _check(prompt, self._model.vocab_size)
        if prompt.config.max_new_tokens:
            self._cache.add()
            self._sequences.append(_Sequence.of(self._n_asked, prompt, self._model.context))
        self._n_asked += 1
        return self._n_asked - 1

    def finish(self, sequences: Sequence[int]) -> None:
        """Go on without these, between two steps; those that are finished already are left alone."""
        kept = [place for place, of in enumerate(self._sequences) if of.index not in sequences]
        if len(kept) < len(self._sequences):
            self._cache.keep(kept)
            self._sequences = [self._sequences[place] for place in kept]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[NewToken, ...]:
        if self.is_done:
            raise StopIteration
        self._read()
        ready = [of for of in self._sequences if of.is_read]
        # Nobody has drawn yet: whoever leaves the diverged ones out loses no token of the others.
        if diverged := tuple(of.index for of in ready if not is_finite(of.logits_V)):
            raise DivergedError(NOT_FINITE, diverged)
        tokens = tuple(of.next_token() for of in ready)
        self.finish([new.sequence for new in tokens if new.finish])
        return tokens

    def _read(self) -> None:
        """One pass through the model, with a share of it for each sequence that has something to read."""
        for sequence in self._sequences:
            sequence.slide(self._model.context)
        unread = [(place, of) for place, of in enumerate(self._sequences) if not of.is_read]
        if not unread:  # the pass before was followed by DivergedError
            return
        share = max(1, self._tokens_at_once // len(unread))
        stretches = [of.stretch(place, share) for place, of in unread]
        logits_RV = self._model.read(self._cache, stretches).cpu()
        for (_, of), stretch, logits_V in zip(unread, stretches, logits_RV, strict=True):
            of.n_read, of.logits_V = stretch.stop, logits_V


@dataclass(kw_only=True)
class _Sequence:
    """What is kept of a sequence: the window that the model sees, how much of it was read, and what follows that."""

    index: int
    config: GenerationConfig
    window: list[int]
    generator: torch.Generator
    n_read: int = 0
    logits_V: Tensor = field(default_factory=lambda: torch.empty(0))
    written: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, index: int, prompt: Prompt, context: int) -> _Sequence:
        generator = torch.Generator().manual_seed(prompt.config.seed)
        return cls(index=index, config=prompt.config, window=list(prompt.ids[-context:]), generator=generator)

    @property
    def is_read(self) -> bool:
        """Whether the model has read all of the window, so that the next token can be drawn."""
        return self.n_read == len(self.window)

    def slide(self, context: int) -> None:
        """Drop the older half of a window that has outgrown the context."""
        if len(self.window) > context:
            self.window, self.n_read = self.window[-((context + 1) // 2) :], 0

    def stretch(self, place: int, n_tokens: int) -> Stretch:
        stop = min(len(self.window), self.n_read + n_tokens)
        return Stretch(place=place, window=self.window, start=self.n_read, stop=stop)

    def next_token(self) -> NewToken:
        token, log_probability = choose(self.logits_V, self.config, self.generator)
        self.window.append(token)
        self.written.append(token)
        return NewToken(
            sequence=self.index,
            token=token,
            log_probability=log_probability,
            likeliest=likeliest(self.logits_V, self.config.n_likeliest) if self.config.n_likeliest else (),
            finish=self._finish(),
        )

    def _finish(self) -> Finish | None:
        if any(tuple(self.written[-len(stop) :]) == stop for stop in self.config.stop):
            return "stop"
        return "length" if len(self.written) >= self.config.max_new_tokens else None


def _check(prompt: Prompt, n_tokens: int) -> None:
    if not prompt.ids:
        raise InvalidInputError("prompt.ids", "is empty; it takes at least one token to go on from")
    wrong = next((token for token in prompt.ids if not 0 <= token < n_tokens), None)
    if wrong is not None:
        raise InvalidInputError("prompt.ids", f"holds {wrong}; the model knows ids from 0 to {n_tokens - 1}")

"""Text from the model, piece by piece: the end of a run and `run_node.py sample`. Here text becomes tokens and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.data.cache import SEPARATOR
from node.model.generation import Generation, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from common.tokenizer import TextStream, Tokenizer
    from node.model.generation import NewToken
    from node.model.next_token import GenerationConfig
    from node.model.trunk import Trunk

    NewTokens = tuple[NewToken, ...]
    Step = Callable[[Generation], NewTokens]
    UntilEnough = Callable[[Step, Generation], NewTokens]

SAMPLE_TOKENS = 200
SAMPLE_PROMPT = b"The "
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """What has been added to text `index`; `is_last` where nothing follows."""

    index: int
    text: str
    is_last: bool


class TextUpToStop:
    """Text of tokens that come one by one, and nothing from a stop text on.

    What may be the beginning of a stop text is held back until it is known, which is never more than a stop text is
    long. The tokens of `prompt` come before it all and stop nothing.
    """

    def __init__(self, stream: TextStream, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._stream, self._stop, self._held = stream, stop, ""
        self.beginning = "".join(map(stream.add, prompt))
        self.is_stopped = False

    @property
    def n_held(self) -> int:
        """Characters that have come and are held back."""
        return len(self._held)

    def add(self, token: int) -> str:
        """The text that is certain once `token` has come; `is_stopped` says that there will be no more."""
        self._held += self._stream.add(token)
        if self._is_cut():
            return self._take(len(self._held))
        return self._take(len(self._held) - self._n_uncertain())

    def end(self) -> str:
        """The text that was held back, where nothing follows."""
        if not self.is_stopped:
            self._held += self._stream.end()
            self._is_cut()
        return self._take(len(self._held))

    def _is_cut(self) -> bool:
        """Cut what is held at the stop that is complete first, however much comes at a time, if there is one."""
        complete = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if complete:
            self.is_stopped, self._held = True, self._held[: min(complete)[1]]
        return self.is_stopped

    def _take(self, n_chars: int) -> str:
        taken, self._held = self._held[:n_chars], self._held[n_chars:]
        return taken

    def _n_uncertain(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=0)
        lengths = range(min(len(self._held), longest - 1), 0, -1)
        return next((n for n in lengths if any(text.startswith(self._held[-n:]) for text in self._stop)), 0)


class TextWriter:
    """Texts that go on from prompts, all in one batch: an iterator of steps, the first one of the prompts themselves.

    An empty prompt begins a new document.
    `until_enough` computes a step, again and again while too few experts answer, as `Training.until_enough` does.
    """

    def __init__(
        self,
        model: Trunk,
        tokenizer: Tokenizer,
        prompts: Sequence[tuple[bytes, GenerationConfig]],
        until_enough: UntilEnough,
        stop: Sequence[str] = (),
    ) -> None:
        self._until_enough = until_enough
        cut = [tokens_L.tolist() for tokens_L in tokenizer.encode([text for text, _ in prompts])]
        start = document_start(tokenizer)
        asked = [Prompt(ids=tokens or start, config=config) for tokens, (_, config) in zip(cut, prompts, strict=True)]
        self._generation = Generation(model, asked)
        self._texts = [TextUpToStop(tokenizer.stream(), tokens, stop) for tokens in cut]
        self._goes_on = [config.max_new_tokens > 0 for _, config in prompts]

    def __iter__(self) -> Iterator[tuple[TextPiece, ...]]:
        yield tuple(self._first_piece(index) for index in range(len(self._texts)))
        while not self._generation.is_done:
            pieces = tuple(map(self._piece, self._until_enough(next, self._generation)))
            self._generation.finish([piece.index for piece in pieces if piece.is_last])
            yield pieces

    def _first_piece(self, index: int) -> TextPiece:
        text, goes_on = self._texts[index], self._goes_on[index]
        return TextPiece(index=index, text=text.beginning + ("" if goes_on else text.end()), is_last=not goes_on)

    def _piece(self, new: NewToken) -> TextPiece:
        text = self._texts[new.sequence]
        certain = text.add(new.token)
        is_last = text.is_stopped or new.finish is not None
        return TextPiece(index=new.sequence, text=certain + (text.end() if is_last else ""), is_last=is_last)


def document_start(tokenizer: Tokenizer) -> list[int]:
    """Tokens that a new document follows."""
    tokens: list[int] = tokenizer.encode([SEPARATOR])[0].tolist()
    return tokens


def sample_text(
    model: Trunk, tokenizer: Tokenizer, prompt: bytes, config: GenerationConfig, until_enough: UntilEnough
) -> str:
    """Prompt and continuation; bytes that are not UTF-8 become replacement characters."""
    steps = TextWriter(model, tokenizer, [(prompt, config)], until_enough)
    return "".join(piece.text for pieces in steps for piece in pieces)

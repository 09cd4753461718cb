"""Text from the model, piece by piece: the end of a run and `run_node.py sample`. Here bytes are ids, and ids bytes."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.model.generation import Generation, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from node.model.generation import NewToken
    from node.model.next_token import GenerationConfig
    from node.model.transformer import Transformer

    Tokens = tuple[NewToken, ...]
    UntilEnough = Callable[[Callable[[Generation], Tokens], Generation], Tokens]

SAMPLE_BYTES = 200
SAMPLE_PROMPT = b"The "
SAMPLE_TEMPERATURE = 0.8
DOCUMENT_START = b"\n\n"  # what separates documents in the training bytes; an empty prompt begins there


def ids_of(prompt: bytes) -> list[int]:
    """The ids that a prompt is read as. An empty one begins a new document."""
    return list(prompt or DOCUMENT_START)


def bytes_of(token: int) -> bytes:
    """The bytes that an id stands for."""
    return bytes([token])


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """What has been added to text `index`; `is_last` where nothing follows."""

    index: int
    text: str
    is_last: bool


class TextStream:
    """Bytes that come a few at a time, as text: whole characters only, and nothing from a stop text on.

    What is no UTF-8 becomes replacement characters. What may be the beginning of a stop text is held back until it is
    known, which is never more than a stop text is long. `prompt` comes before it all and stops nothing.
    """

    def __init__(self, prompt: bytes, stop: Sequence[bytes] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop, self._held = stop, b""
        self.beginning = self._decoder.decode(prompt)
        self.is_stopped = False

    def add(self, data: bytes) -> str:
        """The text that is certain once `data` has come; `is_stopped` says that there will be no more."""
        self._held += data
        complete = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if complete:  # the first one to be complete, however many bytes come at a time
            self.is_stopped, self._held = True, self._held[: min(complete)[1]]
            return self.end()
        n_certain = len(self._held) - self._n_uncertain()
        certain, self._held = self._held[:n_certain], self._held[n_certain:]
        return self._decoder.decode(certain)

    def end(self) -> str:
        """The text that was held back, where nothing follows."""
        rest, self._held = self._held, b""
        return self._decoder.decode(rest, final=True)

    def _n_uncertain(self) -> int:
        """Bytes at the end that may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=0)
        lengths = range(min(len(self._held), longest - 1), 0, -1)
        return next((n for n in lengths if any(text.startswith(self._held[-n:]) for text in self._stop)), 0)


class TextWriter:
    """Texts that go on from prompts, all in one batch: an iterator of steps, the first one of the prompts themselves.

    `until_enough` computes a step, again and again while too few experts answer, as `Training.until_enough` does.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[tuple[bytes, GenerationConfig]],
        until_enough: UntilEnough,
        stop: Sequence[bytes] = (),
    ) -> None:
        self._until_enough = until_enough
        self._generation = Generation(model, [Prompt(ids=ids_of(text), config=config) for text, config in prompts])
        self._streams = [TextStream(text, stop) for text, _ in prompts]
        self._goes_on = [config.max_new_tokens > 0 for _, config in prompts]

    def __iter__(self) -> Iterator[tuple[TextPiece, ...]]:
        yield tuple(self._first_piece(index) for index in range(len(self._streams)))
        while not self._generation.is_done:
            pieces = tuple(map(self._piece, self._until_enough(next, self._generation)))
            self._generation.finish([piece.index for piece in pieces if piece.is_last])
            yield pieces

    def _first_piece(self, index: int) -> TextPiece:
        stream, goes_on = self._streams[index], self._goes_on[index]
        return TextPiece(index=index, text=stream.beginning + ("" if goes_on else stream.end()), is_last=not goes_on)

    def _piece(self, new: NewToken) -> TextPiece:
        stream = self._streams[new.sequence]
        text = stream.add(bytes_of(new.token))
        is_last = stream.is_stopped or new.finish is not None
        return TextPiece(index=new.sequence, text=text + (stream.end() if is_last else ""), is_last=is_last)


def sample_text(model: Transformer, prompt: bytes, config: GenerationConfig, until_enough: UntilEnough) -> str:
    """Prompt and continuation; bytes that are not UTF-8 become replacement characters."""
    steps = TextWriter(model, [(prompt, config)], until_enough)
    return "".join(piece.text for pieces in steps for piece in pieces)

"""One text of a request on its way through the batch: what was asked, and the pieces that come of it.

Path of a request: app -> asked -> batch -> **written_text** -> answers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.trainer.sampling import TextUpToStop

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping, Sequence

    from common.errors import KilohiveError
    from common.tokenizer import TextStream
    from node.model.generation import Finish, NewToken, Prompt

    Outbox = asyncio.Queue["Piece" | KilohiveError]


@dataclass(frozen=True, kw_only=True, slots=True)
class ToldToken:
    """A token that was written, and the character of the text, counted from 0, at which it begins."""

    new: NewToken
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one token adds to text `index` of a request.

    text: that is certain now; what may be the beginning of a stop text is held back.
    tokens: those that the certain text is of; a piece may have none, and a later one several.
    answered: pairs that each peer has answered for the step, in all layers and for all texts of the batch together.
    finish: why nothing follows, if nothing does.
    """

    index: int
    text: str
    tokens: tuple[ToldToken, ...]
    answered: Mapping[str, int]
    finish: Finish | None


class WrittenText:
    """Text `index` of a request, which puts its pieces into `outbox`. All but `is_cancelled` belongs to the batch.

    `prompt_tokens` are those that the request gave: none of an empty text, which begins a new document.
    """

    def __init__(
        self, index: int, prompt: Prompt, stream: TextStream, prompt_tokens: Sequence[int], stop: Sequence[str]
    ) -> None:
        self.index, self.prompt = index, prompt
        self.outbox: Outbox
        self.is_cancelled = False
        self._text = TextUpToStop(stream, prompt_tokens, stop)
        self._held: deque[ToldToken] = deque()
        self._n_told = 0

    @property
    def beginning(self) -> str:
        """The text of the prompt."""
        return self._text.beginning

    def take(self, new: NewToken, answered: Mapping[str, int]) -> Piece:
        """The piece that a new token makes."""
        self._held.append(ToldToken(new=new, offset=self._n_told + self._text.n_held))
        text = self._text.add(new.token)
        finish = "stop" if self._text.is_stopped else new.finish
        if finish:
            text += self._text.end()
        self._n_told += len(text)
        is_whole = finish is not None and not self._text.is_stopped
        tokens = tuple(self._told_tokens(is_whole=is_whole))
        return Piece(index=self.index, text=text, tokens=tokens, answered=answered, finish=finish)

    def _told_tokens(self, *, is_whole: bool) -> list[ToldToken]:
        """Those that begin in text that was told; at the end of a text that no stop text has cut, all."""
        told = []
        while self._held and (is_whole or self._held[0].offset < self._n_told):
            told.append(self._held.popleft())
        return told

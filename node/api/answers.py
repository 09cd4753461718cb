"""What a client gets: OpenAI's objects, whole or chunk by chunk.

Path of a request: app -> asked -> batch -> written_text -> **answers**.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from common.tokenizer import Tokenizer
    from node.api.written_text import Piece, ToldToken

    Json = dict[str, Any]


class AnswerKind(Protocol):
    """What differs between a completion and a chat."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def beginnings(self) -> list[Json]:
        """Choices of the chunks before the first token."""

    def part(self, piece: Piece) -> Json | None:
        """The choice of a chunk; None if nothing is to be told yet."""

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        """A whole choice."""


class Answer:
    """The objects of one request, which all have one id. `usage` counts the pieces that went through it."""

    def __init__(self, kind: AnswerKind, model: str, prompt_tokens: int, *, tells_peers: bool = False) -> None:
        self._kind, self._model, self._prompt_tokens = kind, model, prompt_tokens
        self._id, self._created_s = f"{kind.id_prefix}-{uuid.uuid4().hex}", int(time.time())
        self._tells_peers = tells_peers
        self._n_written = 0

    @property
    def usage(self) -> Json:
        """Tokens of the prompts, once each, and of all texts."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._n_written,
            "total_tokens": self._prompt_tokens + self._n_written,
        }

    def beginnings(self) -> list[Json]:
        """Chunks before the first token."""
        return [self._chunk([choice]) for choice in self._kind.beginnings()]

    def chunk(self, piece: Piece) -> Json | None:
        """The chunk of a piece, if there is anything to tell."""
        self._n_written += 1
        choice = self._kind.part(piece)
        if self._tells_peers:
            told = {"experts": sum(piece.answered.values()), "peers": dict(piece.answered)}
            return {**self._chunk([] if choice is None else [choice]), "kilohive": told}
        return None if choice is None else self._chunk([choice])

    def usage_chunk(self) -> Json:
        """The last chunk of a stream that was asked for it."""
        return {**self._chunk([]), "usage": self.usage}

    def whole(self, pieces: Sequence[Piece], n_choices: int) -> Json:
        """Everything at once."""
        self._n_written = len(pieces)
        by_choice: list[list[Piece]] = [[] for _ in range(n_choices)]
        for piece in pieces:
            by_choice[piece.index].append(piece)
        choices = [self._kind.choice(index, of_choice) for index, of_choice in enumerate(by_choice)]
        return {**self._object(self._kind.whole_object), "choices": choices, "usage": self.usage}

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._object(self._kind.chunk_object), "choices": choices}

    def _object(self, name: str) -> Json:
        return {"id": self._id, "object": name, "created": self._created_s, "model": self._model}


class Completion:
    """Choices of `/v1/completions`. `beginnings_of` are the prompts' texts where they are to be repeated, else empty.

    `is_told` says that log-probabilities are.
    """

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, beginnings_of: Sequence[str], tokenizer: Tokenizer, *, is_told: bool) -> None:
        self._beginnings, self._tokenizer, self._is_told = beginnings_of, tokenizer, is_told

    def beginnings(self) -> list[Json]:
        """The prompts, where they are to be repeated."""
        return [self._choice(index, text, [], None) for index, text in enumerate(self._beginnings) if text]

    def part(self, piece: Piece) -> Json | None:
        """What a piece adds."""
        if not (piece.text or piece.finish or (self._is_told and piece.tokens)):
            return None
        return self._choice(piece.index, piece.text, piece.tokens, piece.finish)

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        """All of a text."""
        text = self._beginnings[index] + "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        return self._choice(index, text, tokens, pieces[-1].finish)

    def _choice(self, index: int, text: str, tokens: Sequence[ToldToken], finish: str | None) -> Json:
        logprobs = self._logprobs(index, tokens) if self._is_told and tokens else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, tokens: Sequence[ToldToken]) -> Json:
        names = {token: _name(self._tokenizer, token) for told in tokens for token in _ids(told)}
        before = len(self._beginnings[index])
        return {
            "tokens": [names[told.new.token] for told in tokens],
            "token_logprobs": [told.new.log_probability for told in tokens],
            "top_logprobs": [{names[token]: value for token, value in told.new.likeliest} for told in tokens],
            "text_offset": [before + told.offset for told in tokens],
        }


class ChatAnswer:
    """Choices of `/v1/chat/completions`; `is_told` says that log-probabilities are."""

    id_prefix = "chatcmpl"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, n_choices: int, tokenizer: Tokenizer, *, is_told: bool) -> None:
        self._n_choices, self._tokenizer, self._is_told = n_choices, tokenizer, is_told

    def beginnings(self) -> list[Json]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self._n_choices)
        ]

    def part(self, piece: Piece) -> Json | None:
        """What a piece adds."""
        if not (piece.text or piece.finish or (self._is_told and piece.tokens)):
            return None
        delta = {"content": piece.text} if piece.text else {}
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish,
        }

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        """All of a reply."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        logprobs = self._logprobs([token for piece in pieces for token in piece.tokens])
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": pieces[-1].finish}

    def _logprobs(self, tokens: Sequence[ToldToken]) -> Json | None:
        if not self._is_told:
            return None
        return {"content": [self._told(told) for told in tokens], "refusal": None}

    def _told(self, told: ToldToken) -> Json:
        likeliest = [self._of_token(token, value) for token, value in told.new.likeliest]
        return {**self._of_token(told.new.token, told.new.log_probability), "top_logprobs": likeliest}

    def _of_token(self, token: int, log_probability: float) -> Json:
        data = self._tokenizer.decode([token])
        return {"token": _name(self._tokenizer, token), "logprob": log_probability, "bytes": list(data)}


def event(data: Mapping[str, Any]) -> bytes:
    """One event of a stream. All but ASCII is escaped: some clients take other characters for ends of lines."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


END_OF_STREAM = b"data: [DONE]\n\n"
NO_NEWS = b": still waiting\n\n"


def _ids(told: ToldToken) -> list[int]:
    return [told.new.token, *(token for token, _ in told.new.likeliest)]


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or what OpenAI writes for one that is no whole character."""
    data = tokenizer.decode([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

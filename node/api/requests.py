"""What clients may ask for, as OpenAI's API has it, checked field by field.

Path of a request: app -> **requests** -> asked -> batch -> answers. Fields that change nothing here are ignored, since
clients send many; those that would change what is meant, and that this server does not have, are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from common.errors import InvalidInputError
from node.model.next_token import SEEDS

MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_MESSAGES = 4096
MAX_NAME_CHARS = 512

MEANS_NOTHING: Final[dict[str, tuple[object, ...]]] = {
    "suffix": (None,),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
}
"""Fields that this server does not have, and the values of each that ask for nothing."""


def _prompts(value: object) -> list[str] | list[list[int]]:
    """A text, several, ids, or several lists of ids, as a list of either."""
    if value is None:
        return [""]
    if isinstance(value, str):
        return [_text("prompt", value)]
    if not isinstance(value, list) or not value:
        raise InvalidInputError("prompt", "must be a text, a list of texts, token ids, or a list of lists of those")
    if all(isinstance(item, str) for item in value):
        return [_text("prompt", item) for item in value]
    lists = value if all(isinstance(item, list) for item in value) else [value]
    if not all(lists) or not all(type(token) is int for tokens in lists for token in tokens):
        raise InvalidInputError("prompt", "holds something that is neither a text nor a list of token ids")
    return lists


def _text(field: str, text: str) -> str:
    """JSON can hold halves of characters, which are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidInputError(field, "holds half of a surrogate pair, which is no character") from None
    return text


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidInputError("stop", "must be a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise InvalidInputError("stop", f"holds {len(stops)} texts; it takes {MAX_STOPS} at most")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise InvalidInputError("stop", f"holds a text that is empty or longer than {MAX_STOP_CHARS} characters")
    return tuple(_text("stop", stop) for stop in stops)


def _content(value: object) -> str:
    """A text, or the texts of parts, one after the other."""
    if isinstance(value, str):
        return _text("messages", value)
    if not isinstance(value, list) or not value:
        raise InvalidInputError("messages", "has a content that is neither a text nor a list of parts")
    return "".join(map(_part, value))


def _part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise InvalidInputError("messages", "has a part that is no text, which is all that this model reads")
    return _text("messages", text)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool | None = None


class GenerationRequest(_Strict):
    """What both ways of asking have. Every field but `kilohive` and `top_k` is OpenAI's."""

    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    seed: Annotated[int, Field(ge=SEEDS.start, lt=SEEDS.stop)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    kilohive: bool | None = None
    """Tell in each chunk of a stream which peers answered for it."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_there(cls, fields: Any) -> Any:  # noqa: ANN401 - whatever the JSON held
        if isinstance(fields, dict):
            for name, harmless in MEANS_NOTHING.items():
                if fields.get(name) not in harmless:
                    raise InvalidInputError(name, "is not supported by this server; leave it out")
        return fields

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with how many tokens it took."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts), Field(validate_default=True)] = [""]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.best_of not in {None, self.n or 1}:
            raise InvalidInputError("best_of", "must be n, or left out: all texts that are written are returned")
        if self.echo and self.logprobs is not None:
            raise InvalidInputError("echo", "goes without logprobs here: those of a prompt are not computed")
        return self


class ChatMessage(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInputError("top_logprobs", "goes with logprobs: true")
        return self

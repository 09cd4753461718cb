"""How a chat becomes a text that the model goes on from: by a template of the model's own, or plainly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from common.errors import ConfigError, DataError, InvalidInputError
from node.trainer.exported.layout import CHAT_TEMPLATE, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from protocol.manifest import Manifest

MAX_TEMPLATE_BYTES = 1 << 20
REMEDY: Final = "name one that fits in the setting chat_template"
SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Tokens that a template may name."""

ROLES: Final = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


class Chat(Protocol):
    """`stop` are the texts that end the model's turn."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a reply, beside those of a request."""

    def text(self, turns: Sequence[Turn]) -> str:
        """What the model goes on from; InvalidInputError for turns that the template does not take."""


class PlainChat:
    """A line `role: text` for each message, then `assistant:`. A reply ends before the next line of a role."""

    stop: Final = tuple(f"\n{role}:" for role in ROLES)

    def text(self, turns: Sequence[Turn]) -> str:
        """All lines."""
        return "".join(f"{turn.role}: {turn.content}\n" for turn in turns) + "assistant:"


@dataclass(frozen=True, kw_only=True)
class TemplateChat:
    """A Jinja template as the library `transformers` renders it, with the special tokens that it may name.

    A reply ends before `special["eos_token"]`, if that is told.
    """

    template: str
    special: dict[str, str]

    @property
    def stop(self) -> tuple[str, ...]:
        """The token that ends a turn."""
        end = self.special.get("eos_token")
        return (end,) if end else ()

    def text(self, turns: Sequence[Turn]) -> str:
        """Render the template up to where the model's turn begins."""
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            rendered: Any = render_jinja_template(
                [conversation], chat_template=self.template, add_generation_prompt=True, **cast("Any", self.special)
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidInputError("messages", f"do not fit the chat template: {error}") from None
        return str(rendered[0][0])


def read_chat(path: Path) -> Chat:
    """The template in a Jinja file or a tokenizer_config.json.

    Raises:
        ConfigError: the file cannot be read.
        DataError: it holds no template that can be rendered.
    """
    chat = _read(path)
    if chat is None:
        raise DataError(f"{path}: has no text {CHAT_TEMPLATE}")
    return chat


def exported_chat(folder: Path) -> Chat:
    """The template in the folder of an exported model; plain if it has none. Raises what `read_chat` does."""
    return _read(folder / TOKENIZER_CONFIG) or PlainChat()


def chat_of_run(manifest: Manifest) -> Chat:
    """The template of the pretrained model that a run is built around, whose files have to be on this machine.

    Plain for a run or a model that has none; what it writes is what the run's export would. Raises DataError.
    """
    if manifest.model.trunk != "hf":
        return PlainChat()
    from node.model.pretrained_tokens import read_tokens  # noqa: PLC0415 - few runs need the library's tokenizers

    tokens = read_tokens(manifest)
    if tokens.chat_template is None:
        return PlainChat()
    special = {part: token for part, token in tokens.special.items() if part in SPECIAL}
    chat = TemplateChat(template=tokens.chat_template, special=special)
    return _tried(chat, f"the template of the pretrained model of {manifest.run_id}")


def _read(path: Path) -> TemplateChat | None:
    """The template in a file, None where it is JSON and names none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"chat_template: {path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_TEMPLATE_BYTES:
        raise DataError(f"{path}: is longer than {MAX_TEMPLATE_BYTES:,} bytes, too long for a chat template")
    chat = _parsed(path, data.decode("utf-8", "replace"))
    return None if chat is None else _tried(chat, str(path))


def _tried(chat: TemplateChat, where: str) -> TemplateChat:
    if len(chat.template) > MAX_TEMPLATE_BYTES:
        raise DataError(f"{where}: is longer than {MAX_TEMPLATE_BYTES:,} bytes; {REMEDY}")
    try:
        chat.text([Turn(role="user", content="Hello")])
    except InvalidInputError as error:
        raise DataError(f"{where}: {error}; {REMEDY}") from None
    return chat


def _parsed(path: Path, text: str) -> TemplateChat | None:
    if path.suffix != ".json":
        return TemplateChat(template=text, special={})
    try:
        table = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: is no JSON: {error}") from None
    if isinstance(table, dict) and CHAT_TEMPLATE not in table:
        return None
    if not isinstance(table, dict) or not isinstance(table[CHAT_TEMPLATE], str):
        raise DataError(f"{path}: has no text {CHAT_TEMPLATE}")
    tokens = {name: _token(table.get(name)) for name in SPECIAL}
    return TemplateChat(template=table[CHAT_TEMPLATE], special={name: token for name, token in tokens.items() if token})


def _token(value: object) -> str:
    """A special token, which such files write as a text or as a table with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""

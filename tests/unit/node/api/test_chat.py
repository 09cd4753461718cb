"""A chat as a text: plainly, or by a template of the model's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError, DataError, InvalidInputError
from node.api.chat import PlainChat, TemplateChat, Turn, exported_chat, read_chat

if TYPE_CHECKING:
    from pathlib import Path

TURNS = [Turn(role="system", content="Be brief."), Turn(role="user", content="Hello")]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_without_a_template_there_is_a_line_for_each_message() -> None:
    assert PlainChat().text(TURNS) == "system: Be brief.\nuser: Hello\nassistant:"
    assert "\nuser:" in PlainChat().stop


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "special": True}])
def test_a_tokenizer_config_has_the_template_and_the_tokens_that_it_names(tmp_path: Path, eos: object) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": eos, "pad_token": None}))
    chat = read_chat(path)
    assert chat.text(TURNS) == "<s><system>Be brief.<user>Hello<assistant>"
    assert chat.stop == ("</s>",)


def test_a_jinja_file_is_a_template_without_tokens(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE.removeprefix("{{ bos_token }}"))
    chat = read_chat(path)
    assert chat.text(TURNS) == "<system>Be brief.<user>Hello<assistant>"
    assert chat.stop == ()


def test_an_exported_model_brings_its_template_along_if_it_has_one(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}))
    assert exported_chat(tmp_path) == read_chat(path)
    path.write_text(json.dumps({"eos_token": "</s>"}))
    assert isinstance(exported_chat(tmp_path), PlainChat)
    with pytest.raises(DataError, match="has no text chat_template"):
        read_chat(path)


def test_no_file_means_the_plain_form() -> None:
    assert isinstance(read_chat(None), PlainChat)


def test_what_a_template_refuses_is_an_error_of_the_request() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    with pytest.raises(InvalidInputError, match="messages: do not fit the chat template: no system turn"):
        TemplateChat(template=template, special={}).text(TURNS)


def test_a_template_reaches_nothing_outside_of_it() -> None:
    template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(InvalidInputError, match="chat template"):
        TemplateChat(template=template, special={}).text(TURNS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "is no JSON"),
        ("a.json", "[]", "has no text chat_template"),
        ("a.json", "{}", "has no text chat_template"),
        ("a.json", '{"chat_template": 3}', "has no text chat_template"),
        ("a.jinja", "{% if %}", "do not fit the chat template"),
        ("a.jinja", "x" * (1 << 20) + "y", "is longer than 1,048,576 bytes"),
    ],
)
def test_a_file_without_a_usable_template_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        read_chat(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_a_mistake_in_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chat_template: .*none\.json cannot be read: No such file"):
        read_chat(tmp_path / "none.json")

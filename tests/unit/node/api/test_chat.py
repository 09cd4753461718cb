"""A chat as a text: plainly, or by a template of the model's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from common.assets import asset_store
from common.errors import ConfigError, DataError, InvalidInputError
from node.api.chat import PlainChat, TemplateChat, Turn, chat_of_run, exported_chat, read_chat
from tests.support.exported import exported
from tests.support.swarm_parts import small_manifest
from tests.support.tiny_gguf import gguf_manifest
from tests.support.tiny_pretrained import END, kept_manifest, save_chat_model, save_pretrained

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


def test_a_run_of_its_own_writes_chats_plainly() -> None:
    assert isinstance(chat_of_run(small_manifest()), PlainChat)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_run_around_a_pretrained_model_writes_chats_as_its_export_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # else the library's bar leaves a thread behind
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "pretrained"
    manifest = gguf_manifest(source) if kind == "gguf" else kept_manifest(save_chat_model(source))
    exported(tmp_path / "model", manifest, asset_store().find(manifest.assets[0]))
    live, left = chat_of_run(manifest), exported_chat(tmp_path / "model")
    assert live.text(TURNS) == left.text(TURNS) == f"<system>Be brief.{END}<user>Hello{END}<assistant>"
    assert live.stop == left.stop == (END,)


def test_a_run_whose_pretrained_model_has_no_template_writes_chats_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    assert isinstance(chat_of_run(kept_manifest(save_pretrained(tmp_path / "pretrained"))), PlainChat)


def test_a_template_of_the_model_that_cannot_be_rendered_is_named_with_the_setting_that_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    folder = save_chat_model(tmp_path / "pretrained")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    words = "the template of the pretrained model of pretrained-.*: no; name one that fits in the setting chat_template"
    with pytest.raises(DataError, match=words):
        chat_of_run(kept_manifest(folder))


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

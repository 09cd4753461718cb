"""What a request may hold: each field checked, what changes nothing ignored, what would change the meaning refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from common.errors import InvalidInputError
from node.api.requests import ChatRequest, CompletionRequest

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (None, [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_is_a_text_or_ids_or_several_of_either(given: object, prompts: object) -> None:
    assert CompletionRequest.model_validate({"prompt": given}).prompt == prompts


def test_without_a_prompt_a_new_document_begins() -> None:
    assert CompletionRequest.model_validate({}).prompt == [""]


@pytest.mark.parametrize(
    "given", [7, {}, [], [[]], [[1], []], ["a", 1], [1, "a"], [1.5], [True], [None], [[1], "a"], [{"a": 1}]]
)
def test_a_prompt_that_is_nothing_of_that_is_refused_by_name(given: object) -> None:
    with pytest.raises(InvalidInputError, match=r"^prompt: "):
        CompletionRequest.model_validate({"prompt": given})


@pytest.mark.parametrize(
    ("given", "stops"), [(None, ()), ([], ()), ("a", ("a",)), (["a", "bc", "d", "e"], ("a", "bc", "d", "e"))]
)
def test_a_stop_is_a_text_or_up_to_four(given: object, stops: tuple[str, ...]) -> None:
    assert CompletionRequest.model_validate({"stop": given}).stop == stops


@pytest.mark.parametrize("given", [1, ["a"] * 5, [""], ["a", 1], {"a": 1}, "x" * 1025])
def test_a_stop_that_is_nothing_of_that_is_refused_by_name(given: object) -> None:
    with pytest.raises(InvalidInputError, match=r"^stop: "):
        CompletionRequest.model_validate({"stop": given})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Hi", "Hi"),
        ("", ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_a_message_is_a_text_or_parts_of_it(content: object, text: str) -> None:
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": content, "name": "Ann"}]})
    assert request.messages[0].content == text


@pytest.mark.parametrize(
    "content",
    [None, 1, [], ["a"], [{"type": "image_url", "image_url": {"url": "data:"}}], [{"type": "text"}]],
)
def test_a_message_that_is_no_text_is_refused(content: object) -> None:
    with pytest.raises(InvalidInputError, match=r"^messages: has a "):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "\ud800"},
        {"stop": "\udfff"},
    ],
)
def test_half_a_character_is_no_text(fields: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError, match="half of a surrogate pair"):
        CompletionRequest.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "b"},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"logit_bias": {"50": 1}},
        {"best_of": 2},
        {"best_of": 3, "n": 2},
        {"echo": True, "logprobs": 0},
    ],
)
def test_what_would_change_a_completion_and_is_not_there_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"^{next(iter(fields))}: "):
        CompletionRequest.model_validate({"prompt": "a", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
        {"web_search_options": {}},
        {"top_logprobs": 3},
    ],
)
def test_what_would_change_a_chat_and_is_not_there_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"^{next(iter(fields))}: "):
        ChatRequest.model_validate({"messages": HELLO, **fields})


def test_what_asks_for_nothing_and_what_nobody_knows_is_ignored() -> None:
    fields = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "frequency_penalty": 0.0,
        "presence_penalty": None,
        "logit_bias": {},
        "user": "ann",
        "store": False,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "never_heard_of": [1, {"a": 2}],
    }
    assert ChatRequest.model_validate({"messages": HELLO, **fields}).n is None
    assert CompletionRequest.model_validate({"prompt": "a", "best_of": 2, "n": 2, "suffix": None}).n == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 1.1),
        ("top_p", -1),
        ("n", 0),
        ("n", 129),
        ("seed", 1 << 64),
        ("seed", "x"),
        ("stream", "yes"),
        ("logprobs", 21),
        ("logprobs", True),
        ("model", 3),
        ("model", "x" * 513),
        ("stream_options", 1),
        ("top_k", -2),
    ],
)
def test_a_value_out_of_its_range_or_of_another_type_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({field: value})
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize("messages", [[], "Hello", [{"role": "tool", "content": "a"}], [{"role": "user"}], [1], None])
def test_messages_that_are_none_are_refused(messages: object) -> None:
    with pytest.raises((ValidationError, InvalidInputError)):
        ChatRequest.model_validate({"messages": messages})


def test_a_long_list_of_wrong_messages_makes_one_error() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"messages": [1] * 4000})
    assert caught.value.error_count() == 1

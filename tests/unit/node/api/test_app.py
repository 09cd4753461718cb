"""The endpoints: what each answers, in OpenAI's objects, and that no body makes the server fail."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.tokenizer import FileTokenizer
from node.api import app as app_module
from node.api.chat import TemplateChat
from tests.support.serving import ANSWERED, CONTEXT, NAME, app_of, running_batch, small_model
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from tests.support.serving import SmallModel

    Json = dict[str, Any]

HELLO = [{"role": "user", "content": "Hello"}]


@asynccontextmanager
async def client(small: SmallModel | None = None, **limits: int) -> AsyncIterator[httpx.AsyncClient]:
    small = small or small_model()
    async with running_batch(small, **limits) as batch, app_of(small, batch) as asking:
        yield asking


async def completion(asking: httpx.AsyncClient, **fields: Any) -> Json:
    answer = await asking.post("/v1/completions", json={"prompt": "The ", "seed": 1, **fields})
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


async def refused(asking: httpx.AsyncClient, path: str = "/v1/completions", **fields: Any) -> tuple[int, Json]:
    answer = await asking.post(path, json=fields)
    error: Json = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error


def events(text: str) -> list[Json]:
    """Chunks of a stream, which ended as it should."""
    parts = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


async def test_a_completion_has_its_text_its_usage_and_why_it_ended() -> None:
    async with client() as asking:
        found = await completion(asking, max_tokens=9)
    assert found["object"] == "text_completion"
    assert found["model"] == NAME
    (choice,) = found["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}


async def test_without_a_length_a_completion_has_16_tokens_and_a_reply_goes_to_the_end_of_the_context() -> None:
    async with client() as asking:
        assert (await completion(asking))["usage"]["completion_tokens"] == 16
        reply = (await asking.post("/v1/chat/completions", json={"messages": HELLO})).json()
    assert reply["usage"]["total_tokens"] == CONTEXT


async def test_each_of_several_choices_is_the_one_of_its_own_seed_and_its_own_prompt() -> None:
    async with client() as asking:
        both = await completion(asking, prompt=["The ", "A "], n=2)
        alone = [
            (await completion(asking, prompt=prompt, seed=seed))["choices"][0]["text"]
            for prompt in ("The ", "A ")
            for seed in (1, 2)
        ]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in both["choices"]] == alone
    assert both["usage"]["prompt_tokens"] == 6


async def test_ids_are_a_prompt_too_and_an_empty_one_begins_a_document() -> None:
    async with client() as asking:
        said = (await completion(asking))["choices"][0]["text"]
        assert (await completion(asking, prompt=list(b"The ")))["choices"][0]["text"] == said
        begun = await completion(asking, prompt="")
        assert begun["choices"] == (await completion(asking, prompt="\n\n"))["choices"]
        assert begun["usage"]["prompt_tokens"] == 2


async def test_the_prompt_is_repeated_where_it_is_asked_for() -> None:
    async with client() as asking:
        said = (await completion(asking))["choices"][0]["text"]
        assert (await completion(asking, echo=True))["choices"][0]["text"] == f"The {said}"
        streamed = await asking.post(
            "/v1/completions", json={"prompt": "The ", "seed": 1, "echo": True, "stream": True}
        )
    assert "".join(chunk["choices"][0]["text"] for chunk in events(streamed.text)) == f"The {said}"


async def test_a_top_p_of_0_and_a_temperature_of_0_take_the_likeliest_whatever_the_seed() -> None:
    async with client() as asking:
        greedy = [
            await completion(asking, seed=seed, **how) for seed in (1, 2) for how in ({"top_p": 0}, {"temperature": 0})
        ]
    assert len({found["choices"][0]["text"] for found in greedy}) == 1


async def test_without_a_seed_two_answers_differ() -> None:
    async with client() as asking:
        one, other = [await completion(asking, seed=None, max_tokens=30) for _ in range(2)]
    assert one["choices"] != other["choices"]


async def test_log_probabilities_are_told_for_each_token_with_the_likeliest_beside_it() -> None:
    async with client() as asking:
        found = await completion(asking, max_tokens=5, temperature=0, logprobs=2)
        chat = {"messages": HELLO, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 2}
        reply = (await asking.post("/v1/chat/completions", json=chat)).json()
        bare = await asking.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, "logprobs": True})
    told = found["choices"][0]["logprobs"]
    assert [len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [5] * 4
    for token, value, likeliest in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert max(likeliest.values()) == likeliest[token] == value < 0
    content = reply["choices"][0]["logprobs"]["content"]
    assert (
        bytes(byte for token in content for byte in token["bytes"]).decode("utf-8", "replace")
        == (reply["choices"][0]["message"]["content"])
    )
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in content)
    assert bare.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_a_stream_comes_to_the_same_as_the_whole(logprobs: int | None) -> None:
    async with client() as asking:
        fields = {"prompt": "The ", "seed": 1, "max_tokens": 20, "n": 2, "logprobs": logprobs}
        whole = (await asking.post("/v1/completions", json=fields)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = await asking.post("/v1/completions", json={**fields, **options})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(streamed.text)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        if logprobs is not None:
            tokens = [token for part in parts if part["logprobs"] for token in part["logprobs"]["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]


async def test_a_streamed_reply_begins_with_who_speaks() -> None:
    async with client() as asking:
        streamed = await asking.post("/v1/chat/completions", json={"messages": HELLO, "stream": True, "seed": 3})
        whole = (await asking.post("/v1/chat/completions", json={"messages": HELLO, "seed": 3})).json()
    first, *rest = events(streamed.text)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in rest)
    assert said == whole["choices"][0]["message"]["content"]


async def test_a_stream_says_who_answered_only_where_that_is_asked_for() -> None:
    async with client() as asking:
        fields = {"prompt": "The ", "max_tokens": 5, "stream": True}
        asked = await asking.post("/v1/completions", json={**fields, "kilohive": True})
        plain = await asking.post("/v1/completions", json=fields)
    told = [chunk["kilohive"] for chunk in events(asked.text)]
    assert told == [{"experts": 8, "peers": ANSWERED}] * 5
    assert not any("kilohive" in chunk for chunk in events(plain.text))


async def test_a_reply_ends_where_the_next_turn_begins_and_at_the_templates_end() -> None:
    tokenizer = FileTokenizer(tiny_tokenizer(), "tiny")
    chat = TemplateChat(template="{{ messages[0].content }}", special={"eos_token": "e"})
    async with client(small_model(tokenizer, chat)) as asking:
        fields = {"messages": HELLO, "max_tokens": 60, "seed": 2}
        reply = (await asking.post("/v1/chat/completions", json=fields)).json()["choices"][0]
    assert "e" not in reply["message"]["content"]
    assert reply["finish_reason"] in {"stop", "length"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "x" * (CONTEXT + 1)}, "prompt", f"is {CONTEXT + 1}, but the limit is {CONTEXT}: tokens"),
        ({"prompt": [256]}, "prompt", "holds the id 256; tokens are 0 to 255"),
        ({"prompt": [-1]}, "prompt", "holds the id -1"),
        ({"max_tokens": 101}, "max_tokens", "is 101, but the limit is 100"),
        ({"max_tokens": 0}, "max_tokens", "input should be greater than or equal to 1"),
        ({"n": 13}, "n", "is 13, but the limit is 12"),
        ({"prompt": ["a"] * 1000, "n": 128}, "n", "is 128000, but the limit is 12: texts, one for each prompt"),
        ({"suffix": "x"}, "suffix", "is not supported by this server"),
        ({"stream_options": {"include_usage": 3}}, "stream_options", "stream_options.include_usage: "),
    ],
)
async def test_what_cannot_be_is_refused_with_the_field(fields: Json, param: str, words: str) -> None:
    async with client() as asking:
        status, error = await refused(asking, **{"prompt": "a", **fields})
    assert status == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


async def test_a_chat_that_is_longer_than_the_context_is_refused_with_both_lengths() -> None:
    async with client() as asking:
        status, error = await refused(asking, "/v1/chat/completions", messages=[{"role": "user", "content": "x" * 100}])
    assert (status, error["param"]) == (400, "messages")
    assert f"is 117, but the limit is {CONTEXT}" in error["message"]


async def test_another_model_is_not_found_and_none_means_this_one() -> None:
    async with client() as asking:
        assert (await completion(asking, model=NAME))["model"] == NAME
        status, error = await refused(asking, prompt="a", model="gpt-4")
        assert (status, error["code"]) == (404, "model_not_found")
        assert NAME in error["message"]
        assert (await asking.get("/v1/models/gpt-4")).status_code == 404
        assert (await asking.get(f"/v1/models/{NAME}")).json()["id"] == NAME


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/", 405)]
)
async def test_a_path_that_is_not_there_is_an_error_object_too(method: str, path: str, status: int) -> None:
    async with client() as asking:
        answer = await asking.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"{", "application/json", "the body is not JSON"),
        (b"[1]", "application/json", "the body must be a JSON object"),
        (b'{"prompt": "a"}', "text/plain", "Content-Type: application/json"),
        (b"[" * 9000, "application/json", "body"),
        (b'{"n": ' + b"9" * 5000 + b"}", "application/json", "body"),
        (b'{"prompt": "\xff"}', "application/json", "body"),
        (b"", "application/json", "body"),
    ],
)
async def test_a_body_that_is_no_request_is_refused_in_a_sentence(content: bytes, kind: str, words: str) -> None:
    async with client() as asking:
        answer = await asking.post("/v1/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "stop",
    "seed", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "best_of", "suffix", "logit_bias", "tools",
    "response_format", "kilohive", "user",
]  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": JSON}),
    max_size=3,
)
BODIES = st.builds(
    lambda fields, prompt, messages: {**fields, **prompt, **messages},
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5),
    st.fixed_dictionaries({}, optional={"prompt": st.text(max_size=6) | JSON}),
    st.fixed_dictionaries({}, optional={"messages": MESSAGES}),
)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_body_makes_the_server_fail(path: str) -> None:
    runner = asyncio.Runner()
    with runner:
        stack = client()
        asking = runner.run(stack.__aenter__())

        @given(BODIES)
        @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        def ask(body: Json) -> None:
            sent = asking.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            answer = runner.run(sent)
            assert answer.status_code in {200, 400, 404}, answer.text
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]

        try:
            ask()
        finally:
            runner.run(stack.__aexit__(None, None, None))


async def test_more_than_waits_is_told_when_to_come_again() -> None:
    small = small_model()
    async with client(small, max_batch=1, max_queue=1) as asking:
        small.here.hold()
        tasks = [asyncio.create_task(completion(asking)) for _ in range(2)]
        while "kilohive_texts_waiting 2.0" not in (await asking.get("/metrics")).text:  # noqa: ASYNC110 - its own doing
            await asyncio.sleep(0.01)
        answer = await asking.post("/v1/completions", json={"prompt": "a"})
        small.here.release()
        await asyncio.gather(*tasks)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"


async def test_hosts_that_stay_away_are_an_event_in_a_stream_and_a_status_elsewhere() -> None:
    small = small_model()
    small.counted.failing, small.here.waits, small.here.live = set(range(5, 100_000)), lambda: False, (16, 0)
    async with client(small) as asking:
        streamed = await asking.post("/v1/completions", json={"prompt": "a", "stream": True})
        later = await asking.post("/v1/completions", json={"prompt": "a"})
        health = await asking.get("/health")
    first, *_, last = [part for part in streamed.text.split("\n\n") if part]
    assert json.loads(first.removeprefix("data: "))["choices"]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "experts_unavailable"
    assert later.status_code == health.status_code == 503
    assert "16 of 32 experts have no host that answers" in later.json()["error"]["message"]
    assert later.headers["retry-after"]
    assert health.json() == {"status": "unavailable", "message": "16 of 32 experts have no host that answers"}


async def test_health_is_well_with_some_experts_gone_and_says_how_many() -> None:
    small = small_model()
    async with client(small) as asking:
        whole = await asking.get("/health")
        small.here.live = (16, 3)
        some = await asking.get("/health")
    assert whole.json() == {"status": "ok", "message": "all 32 experts have a host"}
    assert (some.status_code, some.json()["message"]) == (200, "13 of 32 experts have no host that answers")


async def test_a_request_that_takes_too_long_ends_and_is_not_to_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.support.serving.REQUEST_S", 0.05)
    monkeypatch.setattr(app_module, "NO_NEWS_S", 0.01)
    small = small_model()
    async with client(small) as asking:
        small.here.hold()
        whole = await asking.post("/v1/completions", json={"prompt": "a"})
        streamed = await asking.post("/v1/completions", json={"prompt": "a", "stream": True})
        small.here.release()
    assert (whole.status_code, whole.headers["x-should-retry"]) == (504, "false")
    assert "took longer than 0.05 s" in whole.json()["error"]["message"]
    assert ": still waiting" in streamed.text
    assert '"code":"timeout"' in streamed.text


async def test_a_bug_is_a_500_that_says_nothing_of_its_insides(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_model()
    async with client(small) as asking:
        monkeypatch.setattr(app_module, "texts_of", lambda *_: 1 / 0)
        answer = await asking.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "the server has failed; its log says how",
        "type": "server_error",
        "param": None,
        "code": None,
    }


async def test_the_page_comes_with_its_policy_and_needs_nothing() -> None:
    async with client() as asking:
        answer = await asking.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_the_figures_count_answers_texts_and_tokens() -> None:
    async with client() as asking:
        await completion(asking, max_tokens=5)
        await refused(asking, prompt="a", n=0)
        await asking.get("/v1/no/such/path/of/a/stranger")
        text = (await asking.get("/metrics")).text
    for line in (
        'kilohive_http_answers_total{path="/v1/completions",status="200"} 1.0',
        'kilohive_http_answers_total{path="/v1/completions",status="400"} 1.0',
        'kilohive_http_answers_total{path="",status="404"} 1.0',
        "kilohive_written_tokens_total 5.0",
        "kilohive_prompt_tokens_total 4.0",
        "kilohive_texts_running 0.0",
        "kilohive_experts_alive 32.0",
    ):
        assert line in text

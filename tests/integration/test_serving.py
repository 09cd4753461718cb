"""A server over HTTP, asked by OpenAI's own client: alone, eight at once, two hundred at once, and while hosts die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import torch

from common.errors import ConfigError
from common.tokenizer import ByteTokenizer
from common.web.http_server import listening_socket
from node.api.chat import PlainChat
from node.api.config import ServeConfig
from node.api.serve_command import run_serve, serve
from node.api.served_model import ServedModel, SwarmExperts
from node.model.moe import LocalExperts
from node.trainer.train_step import build_transformer
from protocol.manifest import all_blocks
from tests.support.docs import ROOT, fences
from tests.support.serving import CONTEXT, NAME, PATIENCE_S, Serving, serving, small_model
from tests.support.swarm_parts import running_swarm, small_manifest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from node.model.moe import Experts
    from node.model.transformer import Transformer
    from tests.support.swarm_parts import TestSwarm

KEY = "sk-0123456789abcdef"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def server() -> AsyncIterator[Serving]:
    async with serving() as running:
        yield running


async def text_of(client: openai.AsyncOpenAI, **fields: Any) -> str:
    asked = {"model": NAME, "prompt": "The ", "seed": 1, "max_tokens": 20, **fields}
    return str((await client.completions.create(**asked)).choices[0].text)


async def streamed(client: openai.AsyncOpenAI, **fields: Any) -> str:
    stream = await client.completions.create(
        **{"model": NAME, "prompt": "The ", "seed": 1, "max_tokens": 20, "stream": True, **fields}
    )
    return "".join([chunk.choices[0].text async for chunk in stream])


async def test_the_client_lists_the_model_and_finds_it_by_name(server: Serving) -> None:
    client = server.openai()
    assert [model.id async for model in client.models.list()] == [NAME]
    assert (await client.models.retrieve(NAME)).owned_by == "kilohive"


async def test_the_client_completes_streams_and_stops(server: Serving) -> None:
    client = server.openai()
    whole = await text_of(client, temperature=0)
    assert await streamed(client, temperature=0) == whole
    stop = next(char for char in whole if char.isascii())
    answer = await client.completions.create(
        model=NAME, prompt="The ", temperature=0, max_tokens=20, stop=["\0\0", stop]
    )
    assert answer.choices[0].text == whole.partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4


async def test_the_client_repeats_itself_with_a_seed_and_reads_log_probabilities(server: Serving) -> None:
    client = server.openai()
    assert await text_of(client) == await text_of(client) != await text_of(client, seed=2)
    answer = await client.completions.create(model=NAME, prompt="The ", max_tokens=4, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert [len(likeliest) for likeliest in logprobs.top_logprobs] == [3] * 4


async def test_the_client_chats_whole_and_in_a_stream(server: Serving) -> None:
    client = server.openai()
    asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "seed": 5, "max_completion_tokens": 20}
    reply = await client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=1)
    stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == reply.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert reply.choices[1].logprobs is not None


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError),
        ({"prompt": "x" * (CONTEXT + 1)}, openai.BadRequestError),
        ({"max_tokens": 10**6}, openai.BadRequestError),
        ({"suffix": "x"}, openai.BadRequestError),
        ({"temperature": 3}, openai.BadRequestError),
        ({"prompt": "x" * 1_500_000}, openai.APIStatusError),
        ({"prompt": "x" * 999_000}, openai.BadRequestError),
    ],
    ids=["model", "context", "length", "suffix", "temperature", "body", "long prompt"],
)
async def test_the_client_raises_what_it_raises_elsewhere(
    server: Serving, fields: dict[str, Any], error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        await text_of(server.openai(), **fields)
    assert caught.value.body is not None


async def test_the_synchronous_client_works_too(server: Serving) -> None:
    def ask() -> str:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            return client.completions.create(model=NAME, prompt="The ", seed=1, max_tokens=20).choices[0].text

    assert await asyncio.to_thread(ask) == await text_of(server.openai())


async def test_the_example_in_the_docs_runs_as_it_is_printed(server: Serving) -> None:
    (code,) = [fence.code for fence in fences(ROOT / "docs/serving.md") if fence.language == "python"]
    here = code.replace("http://127.0.0.1:8000/v1", f"{server.url}/v1")
    assert here != code
    names: dict[str, Any] = {}
    await asyncio.to_thread(exec, compile(here, "docs/serving.md", "exec"), names)
    assert names["model"] == NAME
    assert names["reply"].usage.completion_tokens == 20


async def test_eight_clients_at_once_each_get_what_one_alone_gets(server: Serving) -> None:
    clients = [server.openai() for _ in range(8)]
    alone = [await text_of(client, seed=seed, max_tokens=40) for seed, client in enumerate(clients)]
    steps = await server.figure("kilohive_written_steps_total")
    together = await asyncio.gather(
        *(streamed(client, seed=seed, max_tokens=40) for seed, client in enumerate(clients))
    )
    assert list(together) == alone
    assert await server.figure("kilohive_written_steps_total") - steps < 8 * 40, "they shared steps"


async def test_of_two_hundred_clients_at_once_some_are_told_to_wait_and_all_others_succeed() -> None:
    small = small_model()
    async with serving(small, max_batch=4, max_queue=16) as server:
        small.here.hold()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=PATIENCE_S) as client:
            fields = {"prompt": "The ", "max_tokens": 5, "seed": 1}
            asking = [asyncio.create_task(client.post(f"{server.url}/v1/completions", json=fields)) for _ in range(200)]
            await server.until("kilohive_texts_waiting", 20)
            small.here.release()
            answers = await asyncio.gather(*asking)
        refused = [answer for answer in answers if answer.status_code == 429]
        texts = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}
        assert {answer.status_code for answer in answers} == {200, 429}
        assert len(refused) <= 180
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert len(texts) == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_makes_room(stream: bool) -> None:
    async with serving(max_batch=1, max_tokens=10**6) as server:
        fields = {"prompt": "The ", "max_tokens": 10**6, "stream": stream}
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            asking = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=fields))
            await server.until("kilohive_texts_running", 1)
            waiting = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=fields))
            await server.until("kilohive_texts_waiting", 1)
            waiting.cancel()
            await server.until("kilohive_texts_waiting", 0)
            asking.cancel()
            await asyncio.gather(asking, waiting, return_exceptions=True)
        await server.until("kilohive_texts_running", 0)
        assert await text_of(server.openai(), max_tokens=3)


async def test_a_key_is_asked_for_and_the_client_says_so() -> None:
    async with serving(key=KEY) as server:
        assert await text_of(server.openai(api_key=KEY))
        for wrong in ("none", KEY[:-1]):
            with pytest.raises(openai.AuthenticationError, match="send the key of this server"):
                await text_of(server.openai(api_key=wrong))


async def test_a_page_of_somebody_else_cannot_ask(server: Serving) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        elsewhere = await client.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
        asked_first = await client.options(
            f"{server.url}/v1/completions",
            headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
        )
        simple = await client.post(
            f"{server.url}/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}
        )
    assert elsewhere.status_code == simple.status_code == 400
    assert asked_first.status_code == 405
    assert "access-control-allow-origin" not in asked_first.headers


async def test_a_stop_ends_streams_with_a_sentence_within_three_seconds() -> None:
    async with serving(max_tokens=10**6) as server:
        body = {"prompt": "The ", "max_tokens": 10**6, "stream": True}
        async with (
            httpx.AsyncClient(timeout=PATIENCE_S) as client,
            client.stream("POST", f"{server.url}/v1/completions", json=body) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)
            async with asyncio.timeout(3):
                server.stop.set()
                await server.task
            rest = [line async for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "stopping"


async def test_neither_a_prompt_nor_a_key_comes_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="node")
    caplog.set_level("DEBUG", logger="uvicorn")
    async with serving(key=KEY) as server:
        await text_of(server.openai(api_key=KEY), prompt="SECRET")
        with pytest.raises(openai.BadRequestError):
            await text_of(server.openai(api_key=KEY), prompt="SECRET" * 100)
    assert "SECRET" not in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("listen", ["0.0.0.0", "192.0.2.7", "::"])  # noqa: S104 - that is what is refused
async def test_who_would_let_others_in_without_a_key_is_told_what_to_do(listen: str) -> None:
    with pytest.raises(ConfigError, match=rf"--listen {listen}: whoever reaches it .*add --key-file FILE"):
        await run_serve(ServeConfig(listen=listen), asyncio.Event())


async def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    with contextlib.closing(listening_socket("127.0.0.1", 0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port: cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            await run_serve(ServeConfig(port=port), asyncio.Event())
    with pytest.raises(ConfigError, match=r"--port: cannot listen on 127\.0\.0\.1:70000: ports end at 65,535"):
        await run_serve(ServeConfig(port=70_000), asyncio.Event())


MANIFEST = small_manifest(
    dtype="fp64",
    codec="fp64",
    model={"gate": "hash", "gate_reads": "tokens", "gate_score": "softmax", "smear": 2, "context": CONTEXT},
)


def model_over(experts: Experts) -> Transformer:
    return build_transformer(MANIFEST, experts, torch.Generator().manual_seed(MANIFEST.seed)).eval()


@contextlib.asynccontextmanager
async def serving_over(swarm: TestSwarm, wait_s: float) -> AsyncIterator[openai.AsyncOpenAI]:
    """A server whose experts are on real hosts."""
    experts = SwarmExperts(swarm.dispatcher, wait_s)
    served = ServedModel(
        name=NAME,
        model=model_over(swarm.dispatcher),
        tokenizer=ByteTokenizer(),
        experts=experts,
        chat=PlainChat(),
        created_s=1,
    )
    listener, stop = listening_socket("127.0.0.1", 0), asyncio.Event()
    task = asyncio.create_task(serve(ServeConfig(), served, listener, "", stop))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=5, timeout=PATIENCE_S) as client:
            await client.models.list()
            yield client.with_options(max_retries=0)
    finally:
        stop.set()
        await task


async def undisturbed() -> str:
    small = small_model()
    served = ServedModel(
        name=NAME,
        model=model_over(LocalExperts(MANIFEST)),
        tokenizer=ByteTokenizer(),
        experts=small.here,
        chat=PlainChat(),
        created_s=1,
    )
    small.served = served
    async with serving(small) as server:
        return await text_of(server.openai(), max_tokens=24)


async def test_a_host_that_stops_in_mid_stream_costs_a_failover_and_another_one_a_wait() -> None:
    expected = await undisturbed()
    with running_swarm(MANIFEST, n_hosts=1) as swarm:
        swarm.add_host("other", all_blocks(MANIFEST.model))
        async with serving_over(swarm, wait_s=PATIENCE_S) as client:
            stream = await client.completions.create(
                model=NAME, prompt="The ", seed=1, max_tokens=24, stream=True, extra_body={"kilohive": True}
            )
            text, peers = "", list[set[str]]()
            async for chunk in stream:
                text += chunk.choices[0].text if chunk.choices else ""
                peers.append(set(chunk.kilohive["peers"]))  # type: ignore[attr-defined]
                if len(peers) == 6:
                    await asyncio.to_thread(swarm.hosts[0].stop)
                if len(peers) == 12:
                    await asyncio.to_thread(swarm.hosts[1].stop)
                    await asyncio.to_thread(swarm.add_host, "third", all_blocks(MANIFEST.model))
    assert text == expected
    assert peers[0] <= {"peer0", "other"}
    assert peers[-1] == {"third"}


async def test_hosts_that_stay_away_end_the_stream_and_the_next_request_says_how_many_experts_are_gone() -> None:
    with running_swarm(MANIFEST, n_hosts=1) as swarm:
        async with serving_over(swarm, wait_s=0.2) as client:
            stream = await client.completions.create(model=NAME, prompt="The ", max_tokens=60, stream=True)
            for _ in range(4):
                await anext(stream)
            await asyncio.to_thread(swarm.hosts[0].stop)
            with pytest.raises(openai.APIError, match="32 of 32 experts have no host that answers, after a wait"):
                await rest_of(stream)
            with pytest.raises(openai.InternalServerError, match="32 of 32 experts have no host") as caught:
                await text_of(client)
            assert caught.value.status_code == 503
            await asyncio.to_thread(swarm.add_host, "other", all_blocks(MANIFEST.model))
            assert await text_of(client)


async def rest_of(stream: openai.AsyncStream[Any]) -> None:
    async for _ in stream:
        pass

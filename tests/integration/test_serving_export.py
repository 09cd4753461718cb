"""A model that has left its swarm, served from its folder to OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import openai
import pytest
import torch

from common.errors import CheckpointError, ConfigError
from common.web.http_server import listening_socket
from node.api.chat import Turn
from node.api.config import ServeConfig
from node.api.serve_command import run_serve, serve, served_model
from node.api.served_model import ExpertCount
from tests.support.exported import exported
from tests.support.serving import PATIENCE_S
from tests.support.tiny_pretrained import END, kept_manifest, save_chat_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from node.api.served_model import ServedModel


@contextlib.asynccontextmanager
async def served(config: ServeConfig) -> AsyncIterator[tuple[ServedModel, openai.AsyncOpenAI]]:
    """The model of a folder, and a client of a server of it."""
    stop, listener = asyncio.Event(), listening_socket("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    async with served_model(config, stop) as model, openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        work = asyncio.create_task(serve(config, model, listener, "", stop))
        try:
            yield model, client
        finally:
            stop.set()
            await asyncio.wait_for(work, PATIENCE_S)
            listener.close()


async def test_a_model_that_has_left_its_swarm_is_served_from_its_folder(tmp_path: Path) -> None:
    trunk, manifest = exported(tmp_path / "model")
    async with served(ServeConfig(export=tmp_path / "model")) as (model, client):
        assert model.name == manifest.run_id
        assert model.experts.count() == ExpertCount(live_by_layer=(16, 16), per_layer=16)
        ids = torch.arange(8)[None]
        torch.testing.assert_close(model.model(ids), trunk(ids))
        answer = await client.completions.create(model=model.name, prompt="The ", max_tokens=5)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5


async def test_a_chat_with_an_export_is_written_as_its_pretrained_model_writes_chats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    source, folder = save_chat_model(tmp_path / "pretrained"), tmp_path / "model"
    exported(folder, kept_manifest(source, context=64), (source / "tokenizer.json").read_bytes())
    turns = [Turn(role="system", content="Be brief."), Turn(role="user", content="Hello")]
    messages: Any = [{"role": turn.role, "content": turn.content} for turn in turns]
    asked: Any = {"max_tokens": 5, "temperature": 0}
    async with served(ServeConfig(export=folder)) as (model, client):
        assert model.chat.text(turns) == f"<system>Be brief.{END}<user>Hello{END}<assistant>"
        assert model.chat.stop == (END,)
        reply = await client.chat.completions.create(model=model.name, messages=messages, **asked)
        plain = await client.completions.create(model=model.name, prompt=model.chat.text(turns), **asked)
        assert reply.choices[0].message.content == plain.choices[0].text.partition(END)[0]
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}")
    async with served_model(ServeConfig(export=folder, chat_template=str(template)), asyncio.Event()) as own:
        assert own.chat.text(turns) == "Be brief."


async def test_an_export_that_is_damaged_or_named_beside_a_swarm_is_one_sentence(tmp_path: Path) -> None:
    exported(tmp_path / "model")
    with pytest.raises(ConfigError, match="--export: names a model that needs no swarm"):
        await run_serve(ServeConfig(export=tmp_path / "model", join="swarm.toml", port=0), asyncio.Event())
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        await run_serve(ServeConfig(export=tmp_path / "model", port=0), asyncio.Event())

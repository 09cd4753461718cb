"""`serve`: a trained trunk with the swarm's experts answers over HTTP, until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.text import Text

from common.errors import ConfigError, DrainingError
from common.settings import check_minimums
from common.tasks import until_stopped
from common.text import host_port
from common.web.access import callers_key, names_answered_to
from common.web.http_server import http_server, listening_socket
from common.web.request_checks import CheckConfig
from dht.addresses import served_address
from node.api.app import AppConfig, build_app
from node.api.batch import BatchLimits, ContinuousBatch
from node.api.chat import chat_of_run, exported_chat, read_chat
from node.api.config import MINIMUMS
from node.api.served_model import ExpertsInProcess, ServedModel, SwarmExperts
from node.model.devices import pick_device
from node.trainer.config import SampleConfig
from node.trainer.exported.loading import open_export
from node.trainer.trained_model import check_named, trained_model

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from node.api.config import ServeConfig


async def run_serve(config: ServeConfig, stop: asyncio.Event) -> None:
    """Serve until `stop`.

    Raises:
        ConfigError: a setting is out of its range, the port is in use, or others could call without a key.
    """
    check_minimums(config, MINIMUMS)
    host = await asyncio.to_thread(served_address, config.listen)
    key = await asyncio.to_thread(callers_key, config.key_file, host, "use the model")
    listener = listening_socket(host, config.port)
    with contextlib.closing(listener):
        try:
            async with served_model(config, stop) as served:
                await serve(config, served, listener, key, stop)
        except DrainingError:
            if not stop.is_set():
                raise


async def serve(
    config: ServeConfig, served: ServedModel, listener: socket.socket, key: str, stop: asyncio.Event
) -> None:
    """Serve a model that is there on a bound socket until `stop`; raises what ends the thread that writes."""
    limits = BatchLimits(max_batch=config.max_batch, max_queue=config.max_queue, cache_bytes=config.cache_mb * 1e6)
    host = listener.getsockname()[0]
    checks = CheckConfig(
        key=key,
        hosts=names_answered_to(host, key),
        max_body_bytes=int(config.max_body_kb * 1e3),
    )
    batch = ContinuousBatch(served, limits)
    app_config = AppConfig(max_tokens=config.max_tokens, request_timeout_s=config.request_timeout_s)
    async with http_server(build_app(served, batch, app_config, checks), listener):
        batch.start()
        try:
            _say_where(served.name, host_port(host, listener.getsockname()[1]), config)
            with contextlib.suppress(DrainingError):
                await until_stopped(_wait(batch.failed), stop)
        finally:
            # Streams end with a sentence before the server closes their connections.
            await batch.stop()


async def _wait(failed: asyncio.Future[None]) -> None:
    await failed


def served_model(config: ServeConfig, stop: asyncio.Event) -> AbstractAsyncContextManager[ServedModel]:
    """What `config` names: an exported folder, or a swarm. Raises ConfigError where it names neither."""
    check_named(config, config.export)
    return served_by_swarm(config, stop) if config.export is None else served_from(config.export, config, stop)


@asynccontextmanager
async def served_by_swarm(config: ServeConfig, stop: asyncio.Event) -> AsyncIterator[ServedModel]:
    """The run's trunk over the experts of the swarm that it joins, until the context ends.

    Chats are written as the template of the run's pretrained model says, unless `config` names another.
    """
    chat = await asyncio.to_thread(read_chat, Path(config.chat_template)) if config.chat_template else None
    async with trained_model(_trunk_config(config), stop) as trained:
        if chat is None:
            chat = await asyncio.to_thread(chat_of_run, trained.manifest)
        yield ServedModel(
            name=trained.manifest.run_id,
            model=trained.model,
            tokenizer=trained.tokenizer,
            experts=SwarmExperts(trained.dispatcher, config.wait_for_experts_s),
            chat=chat,
            created_s=int(time.time()),
        )


@asynccontextmanager
async def served_from(folder: Path, config: ServeConfig, stop: asyncio.Event) -> AsyncIterator[ServedModel]:
    """The model of an exported folder, whose experts are in this process; chats are written as the folder says.

    Raises ConfigError where `config` names a swarm too, CheckpointError for a folder that is not whole.
    """
    if config.join or config.run_id or config.tokenizer:
        raise ConfigError("--export: names a model that needs no swarm; leave --join, run_id and tokenizer out")
    chat = await asyncio.to_thread(read_chat, Path(config.chat_template)) if config.chat_template else None
    torch.set_num_threads(config.threads)
    opening = asyncio.to_thread(open_export, folder, pick_device(config.device))
    exported = await until_stopped(opening, stop)
    if chat is None:
        chat = await asyncio.to_thread(exported_chat, folder)
    model = exported.config.manifest.model
    yield ServedModel(
        name=exported.config.run_id,
        model=exported.model,
        tokenizer=exported.tokenizer,
        experts=ExpertsInProcess(model.n_layers, model.experts_per_layer),
        chat=chat,
        created_s=int(time.time()),
    )


def _trunk_config(config: ServeConfig) -> SampleConfig:
    """What `trained_model` goes by, of a command whose `listen` is for HTTP."""
    return SampleConfig(
        join=config.join,
        swarm=config.swarm,
        run_id=config.run_id,
        initial_peers=config.initial_peers,
        join_timeout_s=config.join_timeout_s,
        insecure_local=config.insecure_local,
        listen=config.swarm_listen,
        tokenizer=config.tokenizer,
        out=config.out,
        device=config.device,
        threads=config.threads,
    )


def _say_where(name: str, at: str, config: ServeConfig) -> None:
    """The result goes to standard output; everything else went to standard error."""
    key = f' -H "Authorization: Bearer $(cat {config.key_file})"' if config.key_file else ""
    body = '{"prompt": "The city ", "max_tokens": 64}'
    text = Text.assemble(
        (f"{name} is served at http://{at}/", "bold"),
        f"\n\n  in a browser  http://{at}/\n  for clients   http://{at}/v1\n"
        f"  from a shell  curl http://{at}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'\n",
    )
    Console(soft_wrap=True, highlight=False).print(text)

"""`contribute`: fetch an expert, train it at home, offer it to the run; the terminal tells what became of it."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import torch

from common.atomic_file import write_atomically
from common.errors import ConfigError, InvalidInputError
from common.events import EventLog
from common.folders import FolderClaim, claimed, data_cache
from common.settings import check_minimums
from common.tasks import until_stopped
from node.averaging.node_averaging import Averaging
from node.contributor.client import ContributionClient
from node.contributor.contribution import Contribution
from node.contributor.local_training import LocalExpert, LocalTraining
from node.contributor.progress import steps_shown, words_shown
from node.data import open_dataset
from node.membership.config import ReachConfig
from node.membership.swarm import Swarm
from node.model.devices import pick_device
from node.model.expert_file import MAX_FILE_BYTES, ExpertId, expert_file, metadata_of, read_expert
from node.trainer.evaluation import print_result
from node.trainer.evaluator.fetch_expert import fetch_expert
from node.trainer.run_files import fetch_tokenizer
from protocol.identity import Identity
from protocol.verdict import Offered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from node.averaging.joining import Downloader
    from node.contributor.config import ContributeConfig
    from node.model.expert_file import Weights
    from protocol.manifest import Manifest

EXIT_OK, EXIT_NOT_TAKEN = 0, 1


async def run_contribute(config: ContributeConfig, stop: asyncio.Event) -> int:
    """Fetch the expert into the file, train that of the file, or offer it: 1 if it is not taken in."""
    _check_config(config)
    if not (config.fetch or config.train):
        return await _contribute(config, stop)
    path = config.file  # is written: what another process has learnt meanwhile would be lost
    with claimed(
        FolderClaim(folder=path.parent, file=path.name, lock=f".{path.name}.lock", role="contribute", flag="file")
    ):
        return await _contribute(config, stop)


async def _contribute(config: ContributeConfig, stop: asyncio.Event) -> int:
    data = await asyncio.to_thread(_read, config)
    place = ExpertId(config.layer, config.expert)
    swarm = Swarm(config, Identity.generate(), ReachConfig(listen=config.listen))
    try:
        await until_stopped(swarm.join(), stop)
        _check_place(place, swarm.manifest)
        if data:
            _check_file(config.file, data, place, swarm.manifest)
        if config.train:
            return await _train(config, swarm, place, data, stop)
        work = _fetch(config.file, swarm, place) if config.fetch else _offer(config, swarm, place, data)
        return await until_stopped(work, stop)
    finally:
        await swarm.leave()


def _check_config(config: ContributeConfig) -> None:
    least = {"layer": 0, "expert": 0, "train": 0, "batch": 1, "lr": 0, "threads": 1, "timeout_s": 1}
    check_minimums(config, {**least, "join_timeout_s": 0.1})
    pick_device(config.device)  # a mistake in it is told before the swarm is looked for
    if config.fetch and config.train:
        raise ConfigError("--fetch, --train: give one of them; --train fetches the expert itself if there is no file")


@asynccontextmanager
async def _downloads(swarm: Swarm) -> AsyncIterator[Downloader]:
    averaging = Averaging(swarm.manifest, swarm.security, swarm.directory, EventLog())
    try:
        yield averaging.client
    finally:
        await averaging.stop()


async def _present(swarm: Swarm, downloads: Downloader, place: ExpertId) -> tuple[Weights, dict[str, str]]:
    """Fetch the present expert as a joiner fetches a block: its weights, and what a file says of them."""
    manifest = swarm.manifest
    replicas = swarm.directory.replicas(place.block(manifest.model))
    weights, version = await fetch_expert(downloads, replicas, place, manifest)
    told = {"run_id": manifest.run_id, "layer": place.layer, "expert": place.expert, "version": version}
    return weights, {name: str(value) for name, value in told.items()}


async def _fetch(path: Path, swarm: Swarm, place: ExpertId) -> int:
    async with _downloads(swarm) as downloads:
        weights, told = await _present(swarm, downloads, place)
    await asyncio.to_thread(_write, path, expert_file(weights, told))
    print_result(f"{path}: {place}, from version {told['version']} of block {place.block(swarm.manifest.model)}")
    return EXIT_OK


async def _train(config: ContributeConfig, swarm: Swarm, place: ExpertId, data: bytes, stop: asyncio.Event) -> int:
    """What was learnt is in the file also if `stop` or an error ends it early."""
    torch.set_num_threads(config.threads)
    tokenizer = await fetch_tokenizer(swarm, config.tokenizer, config.join_timeout_s, stop)
    opening = asyncio.to_thread(
        open_dataset, config.data, cache_dir=data_cache(), seed=swarm.manifest.seed, tokenizer=tokenizer
    )
    dataset = await until_stopped(opening, stop)
    async with _downloads(swarm) as downloads:
        present, told = await until_stopped(_present(swarm, downloads, place), stop)
        start = read_expert(data, swarm.manifest) if data else present
        local_training = LocalTraining(config, swarm, downloads, LocalExpert(place, start), dataset)
        try:
            await _learn(config.file, local_training, (place, told), stop)
            if not stop.is_set():
                # The run has trained on meanwhile: what an evaluator would compare with is another one.
                present, _ = await until_stopped(_present(swarm, downloads, place), stop)
                gain = await until_stopped(local_training.gain(present), stop)
                advice = "offer it without --train" if gain.is_sure else "no gain is sure: train on"
                print_result(f"it gains {gain}; {advice}")
        finally:
            local_training.close()
    return EXIT_OK


async def _learn(
    path: Path, local_training: LocalTraining, about: tuple[ExpertId, dict[str, str]], stop: asyncio.Event
) -> None:
    place, told = about
    try:
        with steps_shown(local_training.steps) as tell:
            await local_training.run(stop, tell)
    finally:
        if local_training.done:
            await asyncio.to_thread(_write, path, expert_file(local_training.weights, told))
            print_result(f"{path}: {place}, after {local_training.done:,} steps")


async def _offer(config: ContributeConfig, swarm: Swarm, place: ExpertId, data: bytes) -> int:
    manifest = swarm.manifest
    offered = Offered(
        run_id=manifest.run_id, layer=place.layer, expert=place.expert, sha256=hashlib.sha256(data).digest()
    )
    client = ContributionClient(swarm.security.caller())
    with words_shown("looking for evaluators") as tell:
        contribution = Contribution(manifest, swarm.directory, client, (offered, data), tell)
        outcome = await contribution.run(config.timeout_s)
    print_result(f"{place}: {outcome.words}")
    return EXIT_OK if outcome.taken_in else EXIT_NOT_TAKEN


def _read(config: ContributeConfig) -> bytes:
    """The file's bytes; none where there is nothing to offer or to go on from."""
    path = config.file
    if config.fetch or (config.train and not path.exists()):
        return b""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: is not there; --fetch writes the present expert to it, --train N trains that"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is longer than {MAX_FILE_BYTES:,} bytes, too long for an expert")
    return data


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _check_place(place: ExpertId, manifest: Manifest) -> None:
    try:
        place.check(manifest.model)
    except InvalidInputError as error:
        raise ConfigError(f"--{str(error).replace(', expert', ', --expert', 1)}") from None


def _check_file(path: Path, data: bytes, place: ExpertId, manifest: Manifest) -> None:
    """What an evaluator would refuse is told at once; so is a file that says it is another expert."""
    try:
        read_expert(data, manifest)
        told = metadata_of(data)
    except InvalidInputError as error:
        raise ConfigError(f"{path}: {error}") from None
    meant = (told.get("layer", str(place.layer)), told.get("expert", str(place.expert)))
    if meant != (str(place.layer), str(place.expert)):
        raise ConfigError(f"{path}: says that it is expert {meant[1]} of layer {meant[0]}, offered was {place}")

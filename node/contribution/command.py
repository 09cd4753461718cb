"""`contribute`: fetch an expert to train at home, and offer it to the run; the terminal tells what became of it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from node.averaging.node_averaging import Averaging
from node.contribution.contribution import Contribution
from node.contribution.contributor import ContributionClient
from node.contribution.expert_file import MAX_FILE_BYTES, Place, expert_file, metadata_of, read_expert
from node.contribution.present import fetch_expert
from node.evaluation import print_result
from node.swarm import Swarm, until_stopped
from protocol.atomic_file import write_atomically
from protocol.errors import ConfigError, InvalidInputError
from protocol.events import EventLog
from protocol.identity import Identity
from protocol.settings import check_minimums
from protocol.verdict import Offered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from node.config import ContributeConfig
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_NOT_TAKEN = 0, 1
LOG_EVERY_S = 5.0


async def run_contribute(config: ContributeConfig, stop: asyncio.Event) -> int:
    """Fetch the expert into the file, or offer the file: 1 if it is not taken in."""
    check_minimums(config, {"layer": 0, "expert": 0, "timeout_s": 1, "join_timeout_s": 0.1})
    data = b"" if config.fetch else await asyncio.to_thread(_read, config.file)
    place, swarm = Place(config.layer, config.expert), Swarm(config, Identity.generate())
    try:
        await until_stopped(swarm.join(), stop)
        _check_place(place, swarm.manifest)
        work = _fetch(config.file, swarm, place) if config.fetch else _offer(config, swarm, place, data)
        return await until_stopped(work, stop)
    finally:
        await swarm.leave()


async def _fetch(path: Path, swarm: Swarm, place: Place) -> int:
    """As a joiner takes a block."""
    manifest, block_id = swarm.manifest, place.block(swarm.manifest.model)
    averaging = Averaging(manifest, swarm.security, swarm.directory, EventLog())
    try:
        replicas = swarm.directory.replicas(block_id)
        weights, version = await fetch_expert(averaging.client, replicas, place, manifest)
    finally:
        await averaging.stop()
    told = {"run_id": manifest.run_id, "layer": place.layer, "expert": place.expert, "version": version}
    data = expert_file(weights, {name: str(value) for name, value in told.items()})
    try:
        await asyncio.to_thread(write_atomically, path, data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    print_result(f"{path}: {place}, from version {version} of block {block_id}")
    return EXIT_OK


async def _offer(config: ContributeConfig, swarm: Swarm, place: Place, data: bytes) -> int:
    manifest = swarm.manifest
    _check_file(config.file, data, place, manifest)
    offered = Offered(
        run_id=manifest.run_id, layer=place.layer, expert=place.expert, sha256=hashlib.sha256(data).digest()
    )
    client = ContributionClient(swarm.security.caller())
    with _shown() as tell:
        contribution = Contribution(manifest, swarm.directory, client, (offered, data), tell)
        outcome = await contribution.run(config.timeout_s)
    print_result(f"{place}: {outcome.words}")
    return EXIT_OK if outcome.taken_in else EXIT_NOT_TAKEN


@contextmanager
def _shown() -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal; elsewhere a line in the log from time to time."""
    console, next_s = Console(stderr=True), 0.0

    def log(words: str) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            logger.info("%s", words)
            next_s = time.monotonic() + LOG_EVERY_S

    if not console.is_terminal:
        yield log
        return
    with console.status("looking for evaluators") as status:
        yield lambda words: status.update(Text(words))  # a peer's words are no markup


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: is not there; --fetch writes the present expert to it, to train on") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is longer than {MAX_FILE_BYTES:,} bytes, too long for an expert")
    return data


def _check_place(place: Place, manifest: Manifest) -> None:
    try:
        place.check(manifest.model)
    except InvalidInputError as error:
        raise ConfigError(f"--{str(error).replace(', expert', ', --expert', 1)}") from None


def _check_file(path: Path, data: bytes, place: Place, manifest: Manifest) -> None:
    """What an evaluator would refuse is told at once; so is a file that says it is another expert."""
    try:
        read_expert(data, manifest)
        told = metadata_of(data)
    except InvalidInputError as error:
        raise ConfigError(f"{path}: {error}") from None
    meant = (told.get("layer", str(place.layer)), told.get("expert", str(place.expert)))
    if meant != (str(place.layer), str(place.expert)):
        raise ConfigError(f"{path}: says that it is expert {meant[1]} of layer {meant[0]}, offered was {place}")

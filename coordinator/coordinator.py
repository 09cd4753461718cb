"""Composition root of a coordinator: creates or opens a run, is its first peer, publishes its manifest.

It is off the training path: kill it and training goes on. Started again in the same folder it has the same run, the
same peer id and the same port, where the run's nodes look for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from common.assets import assets_in_use
from common.atomic_file import write_atomically
from common.config import EVENT_LOG_MINIMUMS
from common.errors import ConfigError, UnavailableError
from common.events import EventLog
from common.folders import SWARM_LOCK, FolderClaim, claimed
from common.program import program_name
from common.settings import check_minimums
from common.tasks import Periodic
from coordinator.config import (
    CoordinatorConfig,
    check_evaluators,
    check_same_run,
    manifest_of,
    owned_by,
    read_manifest,
)
from coordinator.credit.background import collecting
from coordinator.credit.collection import open_collection
from coordinator.credit.config import COLLECTED
from coordinator.dashboard.beside import shown_beside
from coordinator.events import CreditEvent, PeerLeaveEvent, PeerStartEvent
from coordinator.pretrained import keep_pretrained
from coordinator.snapshot_config import SNAPSHOT_MINIMUMS, check_snapshots
from coordinator.snapshots import Snapshots
from coordinator.tokens import check_training, keep_tokenizer, trained_tokenizer
from dht.addresses import DEFAULT_ROUTES, listen_host
from dht.announcer import Announcement, Announcer
from dht.daemon import is_free
from dht.join import publish_manifest
from dht.node import DhtConfig, DhtNode
from dht.peer_memory import PEERS_FILE
from dht.relay.quotas import RelayLimits
from dht.relay.relay import Relay
from protocol.addresses import peer_multiaddress
from protocol.admission import Admission, owners_token
from protocol.announcements import PeerRecord
from protocol.identity import Identity
from protocol.invite import Invite
from protocol.swarm_file import SwarmFile, last_port, listening_told
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.credit.collector import Collected
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

MINIMUMS = {
    "invite_days": 0,
    "credit_period_s": 0,
    "relay_circuits": 0,
    "relay_circuits_per_caller": 1,
    "relay_reservations": 1,
    **SNAPSHOT_MINIMUMS,
    "dashboard_port": 0,
    **EVENT_LOG_MINIMUMS,
}
MANIFEST_FILE = "manifest.toml"
DAY_S = 86_400
PORT_RETRY_S = 0.2
PORT_TIMEOUT_S = 3.0
"""How long last time's port may stay taken: p2pd of a coordinator that was killed lets go of it within a second."""

PUBLISH_PERIOD_S = DAY_S
"""The manifest's record lives for 30 days after the owner's last word."""


async def run_coordinator(config: CoordinatorConfig, stop: asyncio.Event) -> None:
    """Open the run and be its first peer until `stop`. Raises a KilohiveError if that cannot start."""
    check_minimums(config, MINIMUMS)
    check_evaluators(config.evaluators)
    check_training(config)
    with claimed(FolderClaim(folder=config.out, role="coordinator", flag="--out", lock=SWARM_LOCK)):
        await _coordinate(config, stop)


async def _coordinate(config: CoordinatorConfig, stop: asyncio.Event) -> None:
    identity = Identity.load_or_create(config.out / "owner.key")
    if config.train_tokenizer and not (config.out / MANIFEST_FILE).exists():
        tokenizer = await trained_tokenizer(config, config.data, config.out, stop)
        if tokenizer is None:
            return
        config = replace(config, tokenizer=tokenizer, train_tokenizer=0)
    manifest = open_run(config, identity.peer_id)
    async with AsyncExitStack() as stack:
        stack.enter_context(assets_in_use(manifest.assets))
        await _keep_assets(config, manifest)
        admission = Admission(manifest.run_id, owners_token(config.out / "admission.token", create=config.admission))
        log, max_bytes = config.out / "coordinator" / "events.jsonl", config.event_log_bytes
        events = EventLog(log, max_bytes=max_bytes, n_files=config.event_log_files)
        stack.callback(events.close)
        dht = await _first_peer(stack, config, identity, admission, manifest)
        dht.on_lost(stop.set)
        await _announce(stack, config, dht, identity, admission)
        if config.credit_period_s:
            folder = config.out / COLLECTED
            collection = await stack.enter_async_context(open_collection(folder, dht, identity, admission))
            await stack.enter_async_context(collecting(collection, config.credit_period_s, partial(_tell, events)))
        swarm = SwarmFile(
            run_id=manifest.run_id,
            initial_peers=(*dht.addresses, *_peers(config)),
            owner=manifest.owner,
            admission=admission.token,
        )
        invite = _write_invite(config, swarm)
        stack.enter_context(listening_told(config.out, *dht.listening))
        if config.snapshot_every_s:
            snapshots = Snapshots(config, manifest.run_id, events)
            await snapshots.start()
            stack.push_async_callback(snapshots.stop)
        if config.dashboard_port:
            await stack.enter_async_context(shown_beside(config.out, config.dashboard_port, stop))
        events.emit(PeerStartEvent(run_id=manifest.run_id, peer_id=dht.peer_id, addresses=tuple(dht.addresses)))
        Console().print(how_to_join(config.out / "swarm.toml", swarm, invite), soft_wrap=True)
        await stop.wait()
        events.emit(PeerLeaveEvent())
        dht.raise_if_lost()


async def _first_peer(
    stack: AsyncExitStack, config: CoordinatorConfig, identity: Identity, admission: Admission, manifest: Manifest
) -> DhtNode:
    """The run's first peer, which publishes the manifest again and again until `stack` is left."""
    dht = await _start_dht(config, identity, admission)
    stack.push_async_callback(dht.stop)
    dht.serve_only(manifest)
    await publish_manifest(dht, identity, manifest)
    publishing = Periodic("manifest", PUBLISH_PERIOD_S, lambda: _publish_again(dht, identity, manifest))
    publishing.start()
    stack.push_async_callback(publishing.stop)
    return dht


async def _announce(
    stack: AsyncExitStack, config: CoordinatorConfig, dht: DhtNode, identity: Identity, admission: Admission
) -> None:
    """Be among the run's peers, and relay for others if `config` says so, until `stack` is left."""
    if config.relay_circuits:
        await Relay(dht.streams, RelayLimits.of(config)).start()
    relay = dht.relay_address if config.relay_circuits else ""
    announcer = Announcer(dht, identity, admission, describe=_describer(relay, config.evaluators))
    await announcer.start()
    dht.on_restart(announcer.announce_soon)
    stack.push_async_callback(announcer.withdraw)


async def _keep_assets(config: CoordinatorConfig, manifest: Manifest) -> None:
    """Put the files that the manifest names where the trainers of this machine look for them."""
    await asyncio.to_thread(keep_pretrained, manifest, config.out, config.model)
    keep_tokenizer(manifest, config.out, config.tokenizer)


def _write_invite(config: CoordinatorConfig, swarm: SwarmFile) -> str:
    """Into the files from which others read how to join; a token is for this user's eyes only."""
    invite = invite_of(swarm, config.invite_days)
    for path in (config.out / "invite.txt", *([config.invite_file] if config.invite_file else [])):
        write_atomically(path, f"{invite}\n".encode(), mode=0o600 if swarm.admission else 0o644)
    swarm.write(config.out / "swarm.toml")
    return invite


def _tell(events: EventLog, collected: Collected) -> None:
    events.emit(CreditEvent(**asdict(collected)))


async def _publish_again(dht: DhtNode, identity: Identity, manifest: Manifest) -> None:
    try:
        await publish_manifest(dht, identity, manifest)
    except UnavailableError as error:
        logger.warning("%s; trying again in %d hours", error, PUBLISH_PERIOD_S // 3600)


def open_run(config: CoordinatorConfig, owner: str) -> Manifest:
    """The run in `config.out`, or a new one that is written there. Raises ConfigError."""
    path = config.out / MANIFEST_FILE
    given = read_manifest(config.manifest) if config.manifest is not None else None
    if not path.exists():
        wanted = given or manifest_of(config, owner=owner, total_tokens=config.total_tokens)
        manifest = owned_by(wanted, owner, str(config.manifest))
        check_snapshots(config, manifest)
        write_atomically(path, manifest.to_toml().encode())
        logger.info("Created run %s", manifest.run_id)
        return manifest
    manifest = owned_by(read_manifest(path), owner, str(path))
    if given is not None and replace(given, owner=owner) != manifest:
        raise ConfigError(f"{config.out} holds run {manifest.run_id} already, not the one in {config.manifest}")
    if given is None:
        check_same_run(config, manifest, str(config.out))
    check_snapshots(config, manifest)
    logger.info("Opened run %s again", manifest.run_id)
    return manifest


async def _start_dht(config: CoordinatorConfig, identity: Identity, admission: Admission) -> DhtNode:
    host = await asyncio.to_thread(listen_host, config.listen, _peers(config) or DEFAULT_ROUTES)
    port = config.dht_port or await _last_port(config.out / "swarm.toml", host)
    return await DhtNode.start(
        DhtConfig(
            identity=identity,
            initial_peers=_peers(config),
            host=host,
            port=port,
            announce=config.announce,
            admission=admission,
            peers_file=config.out / "coordinator" / PEERS_FILE,
        )
    )


def _peers(config: CoordinatorConfig) -> tuple[str, ...]:
    return tuple(map(peer_multiaddress, config.initial_peers))


async def _last_port(path: Path, host: str) -> int:
    """Last time's port, where the run's nodes look for this peer; 0 at the first start. ConfigError if it is taken."""
    port = last_port(path)
    if not port:
        return 0
    try:
        async with asyncio.timeout(PORT_TIMEOUT_S):
            while not is_free(host, port):  # noqa: ASYNC110 - the kernel does not tell when
                await asyncio.sleep(PORT_RETRY_S)
    except TimeoutError:
        raise ConfigError(
            f"port {port} of {host}, where the nodes of this run look for its coordinator, is in use: stop what uses "
            "it, or choose another port with --dht-port and give the nodes the new invite"
        ) from None
    return port


def _describer(relay: str, evaluators: tuple[str, ...]) -> Callable[[], Announcement]:
    peer = PeerRecord(role="coordinator", software=SOFTWARE, started_s=time.time(), relay=relay, evaluators=evaluators)
    return lambda: Announcement(peer=peer)


def invite_of(swarm: SwarmFile, days: float) -> str:
    """Everything a stranger needs, for so many days from now or, with 0, for ever."""
    expires_s = int(time.time() + days * DAY_S) if days else 0
    return Invite(
        run_id=swarm.run_id,
        initial_peers=swarm.initial_peers,
        owner=swarm.owner,
        expires_s=expires_s,
        admission=swarm.admission,
    ).encode()


def how_to_join(path: Path, swarm: SwarmFile, invite: str) -> Text:
    """What to type, here and on another machine."""
    text = Text.assemble("run ", (swarm.run_id, "bold"), " is up\n\n")
    for purpose, command in (
        ("host experts", f"host --join {path}"),
        ("train", f"train --join {path} --out runs/train"),
        ("look at it", f"status --join {path}"),
        ("its page", f"dashboard --join {path}"),
    ):
        text.append(f"  {purpose:<14}").append(f"{program_name()} {command}\n", style="cyan")
    where = path.with_name("invite.txt")
    text.append(f"\nelsewhere, the same with --join and this invite; it is in {where}:\n\n")
    text.append(f"{program_name()} host --join {invite}\n", style="cyan")
    return text

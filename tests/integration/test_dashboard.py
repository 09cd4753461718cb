"""The run's page on a real DHT: it tells what `status` tells, to whom it may, and leaves no trace in the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from common.errors import ConfigError, UnavailableError
from coordinator.config import StatusConfig
from coordinator.dashboard.command import run_dashboard
from coordinator.dashboard.config import DashboardConfig
from coordinator.status import run_status
from dht.announcer import Announcement, Announcer
from dht.directory import Directory
from dht.join import publish_manifest
from protocol.admission import Admission
from protocol.announcements import BlockRecord, PeerRecord
from protocol.identity import Identity
from protocol.manifest import TRUNK, all_blocks
from protocol.reports import TrainerReport
from protocol.swarm_file import SwarmFile
from tests.support.dht_nodes import MANIFEST, eventually
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from dht.node import DhtNode
    from protocol.manifest import Manifest
    from tests.support.dht_nodes import Start

PATIENCE_S = 30.0
TOKEN = bytes(range(32))
REPORT = TrainerReport(
    step=7,
    run_tokens=700,
    train_bits_per_byte=3.5,
    load_entropy_bits=(2.5,),
    load_cv=(0.5,),
    dead_experts=(1,),
    evaluated_tokens=(0, 600),
    held_out_bits_per_byte=(8.0, 4.0),
    calls_ok=21,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of one host and one trainer, which announce themselves from one node."""

    manifest: Manifest
    node: DhtNode
    announcers: tuple[Announcer, ...]
    swarm: SwarmFile

    def written(self, folder: Path) -> str:
        path = folder / "swarm.toml"
        self.swarm.write(path)
        return str(path)


async def begin(start: Start, token: bytes = b"") -> Run:
    owner = Identity.generate()
    manifest = replace(MANIFEST, owner=owner.peer_id)
    admission = Admission(manifest.run_id, token)
    node = await start(admission=admission)
    await publish_manifest(node, owner, manifest)
    blocks = tuple(
        BlockRecord(block=block, version=5, endpoint="127.0.0.1:4000", n_experts=4, tokens_total=900)
        for block in all_blocks(manifest.model)
    )
    host = Announcement(peer=PeerRecord(role="host", endpoint="127.0.0.1:4000", started_s=1.0), blocks=blocks)
    trunk = BlockRecord(block=TRUNK, version=7, endpoint="127.0.0.1:4001")
    trainer = Announcement(peer=PeerRecord(role="trainer", run_tokens=700), blocks=(trunk,), report=REPORT)
    announcers = tuple(_announcer(node, admission, said) for said in (host, trainer))
    for announcer in announcers:
        assert await announcer.announce_now()
    swarm = SwarmFile(run_id=manifest.run_id, initial_peers=tuple(node.addresses), owner=owner.peer_id, admission=token)
    return Run(manifest=manifest, node=node, announcers=announcers, swarm=swarm)


def _announcer(node: DhtNode, admission: Admission, said: Announcement) -> Announcer:
    return Announcer(node, Identity.generate(), admission, describe=lambda: said)


@asynccontextmanager
async def shown(run: Run, folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The page of a run, once it answers."""
    stop, port = asyncio.Event(), free_port()
    config = DashboardConfig(join=run.written(folder), out=folder / "page", port=port, refresh_s=0.5, **settings)
    serving = asyncio.create_task(run_dashboard(config, stop))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:

            async def answers() -> bool:
                if serving.done():
                    serving.result()
                with contextlib.suppress(httpx.ConnectError):
                    return (await client.get("/health")).status_code == 200
                return False

            await eventually(answers, PATIENCE_S)
            yield client
    finally:
        stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await serving


async def told_by_status(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    await run_status(StatusConfig(join=run.written(folder), json=True), asyncio.Event())
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


async def test_the_page_tells_what_status_tells(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = await begin(start)
    async with shown(run, tmp_path) as client:
        listed = await told_by_status(run, tmp_path, capsys)
        told = (await client.get("/api/overview")).json()
        history = (await client.get("/api/history")).json()
    moving = {"taken_s"}
    assert {name: told["figures"][name] for name in told["figures"].keys() - moving} == (
        {name: listed["figures"][name] for name in listed["figures"].keys() - moving}
    )
    assert told["figures"]["peers"] == {"host": 1, "trainer": 1, "coordinator": 0, "lighthouse": 0}
    assert (told["figures"]["held_out_bits_per_byte"], told["figures"]["dead_experts"]) == (4, 1)
    assert listed["reports"][0]["said"]["calls_ok"] == 21
    assert history["evaluations"] == {"tokens": [0, 600], "bits_per_byte": [8, 4]}
    assert history["figures"]["hosts"][-1] == 1


async def test_the_page_is_no_peer_of_the_run_and_the_run_does_not_miss_it(start: Start, tmp_path: Path) -> None:
    run = await begin(start)
    directory = Directory(run.node, run.manifest.run_id, run.manifest.model)
    async with shown(run, tmp_path):
        await directory.refresh_now()
        assert sorted(peer.role for peer in directory.peers()) == ["host", "trainer"]
    assert await run.announcers[0].announce_now()
    await directory.refresh_now()
    assert sorted(peer.role for peer in directory.peers()) == ["host", "trainer"]


async def test_who_leaves_is_gone_from_the_page_and_the_history_survives_a_restart(
    start: Start, tmp_path: Path
) -> None:
    run = await begin(start)
    async with shown(run, tmp_path) as client:
        for announcer in run.announcers:
            await announcer.withdraw()

        async def gone() -> bool:
            return not any((await client.get("/api/overview")).json()["figures"]["peers"].values())

        await eventually(gone, PATIENCE_S)
    async with shown(run, tmp_path) as client:
        assert (await client.get("/api/overview")).json()["figures"]["held_out_tokens"] is None
        history = (await client.get("/api/history")).json()
    assert history["evaluations"] == {"tokens": [0, 600], "bits_per_byte": [8, 4]}


async def test_of_a_closed_run_the_page_shows_no_secret(start: Start, tmp_path: Path) -> None:
    run = await begin(start, TOKEN)
    async with shown(run, tmp_path) as client:
        paths = ("overview", "join", "history", "peers", "layer?layer=0")
        answers = {path: (await client.get(f"/api/{path}")).text for path in paths}
    assert json.loads(answers["overview"])["figures"]["peers"]["host"] == 1
    assert json.loads(answers["join"]) == {"closed": True, "expired": False, "expires_s": 0, "invite": "", "ways": []}
    kept = b"".join(path.read_bytes() for path in (tmp_path / "page").iterdir())
    for secret in (TOKEN, TOKEN.hex().encode()):
        assert secret not in kept
        assert secret not in "".join(answers.values()).encode()


async def test_an_open_page_is_kept_up_to_date_and_ends_with_the_server(start: Start, tmp_path: Path) -> None:
    run = await begin(start)
    seen: list[float] = []
    async with shown(run, tmp_path) as client:
        reading = asyncio.create_task(_read_events(client.base_url, seen))
        await eventually(lambda: _as_async(len(seen) >= 3), PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        await reading
    assert seen == sorted(set(seen))


async def _as_async(value: bool) -> bool:
    return value


async def _read_events(base: httpx.URL, seen: list[float]) -> None:
    """Until the server ends it: with a client of its own, which is not closed before."""
    async with (
        httpx.AsyncClient(base_url=base, timeout=PATIENCE_S) as client,
        client.stream("GET", "/api/events") as answer,
    ):
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                seen.append(json.loads(line[6:])["figures"]["taken_s"])  # noqa: PERF401 - others look at it meanwhile


async def test_elsewhere_the_page_needs_a_key(start: Start, tmp_path: Path) -> None:
    run = await begin(start)
    with pytest.raises(
        ConfigError, match=r"--listen 0\.0\.0\.0: whoever reaches it could see the run and who is in it"
    ):
        await run_dashboard(DashboardConfig(join=run.written(tmp_path), listen="0.0.0.0"), asyncio.Event())  # noqa: S104
    key_file = tmp_path / "page.key"
    async with shown(run, tmp_path, listen="0.0.0.0", key_file=key_file) as client:  # noqa: S104
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/api/overview")).status_code == 401
        headers = {"Authorization": f"Bearer {key_file.read_text().strip()}"}
        assert (await client.get("/api/overview", headers=headers)).status_code == 200


async def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        config = DashboardConfig(join="unused", port=taken.getsockname()[1], out=tmp_path)
        with pytest.raises(ConfigError, match="--port: cannot listen on 127"):
            await run_dashboard(config, asyncio.Event())


async def test_a_run_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    peers = (f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{Identity.generate().peer_id}",)
    SwarmFile(run_id=MANIFEST.run_id, initial_peers=peers).write(tmp_path / "swarm.toml")
    config = DashboardConfig(join=str(tmp_path / "swarm.toml"), port=0, out=tmp_path, join_timeout_s=0.5)
    with pytest.raises(UnavailableError):
        await run_dashboard(config, asyncio.Event())


async def test_another_runs_history_is_not_gone_on_with(start: Start, tmp_path: Path) -> None:
    async with shown(await begin(start), tmp_path):
        pass
    with pytest.raises(ConfigError, match=r"is the history of .*; choose another --out"):
        async with shown(await begin(start), tmp_path):
            pytest.fail("it is shown beside the history of another run")

"""A coordinator as a process: what it writes, who finds it, how it leaves, and that it comes back as the same peer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from common.assets import stored_assets
from common.command_line import arguments_for
from common.errors import ConfigError, UnavailableError
from coordinator.config import CoordinatorConfig, StatusConfig, read_manifest
from coordinator.coordinator import open_run
from coordinator.status import run_status
from protocol.identity import Identity
from protocol.swarm_file import SwarmFile
from tests.support.ports import free_port
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = [sys.executable, str(ROOT / "run_node.py")]
PATIENCE_S = 30.0


@contextlib.contextmanager
def coordinator(out: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A coordinator that is up; it is killed at the end if it is still there."""
    (out / "swarm.toml").unlink(missing_ok=True)
    arguments = [*PROGRAM, "coordinator", "--out", str(out), *flags]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (out / "swarm.toml").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def status(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, "status", *flags], capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def named(swarm: SwarmFile) -> list[str]:
    """How to name a swarm without an invite or a file of its coordinator."""
    return arguments_for({"run_id": swarm.run_id, "initial_peers": swarm.initial_peers[:1]}, StatusConfig)


def test_status_shows_a_run_that_has_no_host_and_the_coordinator_leaves_cleanly(tmp_path: Path) -> None:
    with coordinator(tmp_path, "--name", "demo", "--experts", "8", "--experts-per-block", "2") as process:
        swarm = SwarmFile.read(tmp_path / "swarm.toml")
        shown = status("--swarm", str(tmp_path / "swarm.toml"))
        invite = (tmp_path / "invite.txt").read_text(encoding="utf-8").strip()
        invited = status("--join", invite, "--json")
        by_hand = status(*named(swarm), "--json")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - started < 3.0
    assert process.returncode == 0
    assert "Traceback" not in stderr
    assert f"host --join {invite}\n" in stdout
    assert json.loads(invited.stdout)["run_id"] == swarm.run_id
    assert shown.returncode == 0
    assert f"run {swarm.run_id}" in shown.stdout
    assert "4 of 4 blocks have no live replica: 0/0-1,1/0-1" in shown.stdout
    found = json.loads(by_hand.stdout)
    assert found["run_id"] == swarm.run_id
    assert [(peer["role"], peer["peer_id"]) for peer in found["peers"]] == [("coordinator", swarm.owner)]
    assert found["blocks_lost"] == ["0/0", "0/1", "1/0", "1/1"]
    assert read_manifest(tmp_path / "manifest.toml").run_id == swarm.run_id


def test_it_collects_receipts_beside_all_else_and_says_what_came_of_it(tmp_path: Path) -> None:
    with coordinator(tmp_path, "--set", "credit_period_s=0.2"):
        log, deadline = tmp_path / "coordinator" / "events.jsonl", time.monotonic() + PATIENCE_S
        while '"event":"credit"' not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    told = [json.loads(line) for line in log.read_text().splitlines()]
    found = next(row for row in told if row["event"] == "credit")
    assert (found["asked"], found["answered"], found["new"], found["refused"]) == (0, 0, 0, 0)
    assert (tmp_path / "coordinator" / "credit" / "credit.sqlite").exists()


def test_it_shows_its_runs_page_from_a_process_that_comes_and_goes_with_it(tmp_path: Path) -> None:
    port = free_port()
    with coordinator(tmp_path, "--name", "demo", "--set", f"dashboard_port={port}") as process:
        told = asked(f"http://127.0.0.1:{port}/api/overview")
        assert told["run_id"] == SwarmFile.read(tmp_path / "swarm.toml").run_id
        assert told["figures"]["peers"]["coordinator"] == 1
        page = asked(f"http://127.0.0.1:{port}/api/join")
        assert page["invite"] == (tmp_path / "invite.txt").read_text(encoding="utf-8").strip()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert f"is shown at http://127.0.0.1:{port}/" in stdout
    assert "Traceback" not in stderr
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=PATIENCE_S)
    assert (tmp_path / "dashboard" / "history.sqlite").exists()


def asked(url: str) -> dict[str, Any]:
    """What is answered at `url`, once it is."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:  # noqa: S310 - this machine
                told: dict[str, Any] = json.load(answer)
                return told
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_the_invite_goes_where_others_can_read_it_without_the_owners_key(tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "invite.txt"
    with coordinator(tmp_path / "run", "--invite-file", str(shared)):
        assert shared.read_text() == (tmp_path / "run" / "invite.txt").read_text()
        assert status("--join", str(shared)).returncode == 0
        healthy = subprocess.run(
            [*PROGRAM, "health", "--state", str(tmp_path / "run")], check=False, timeout=PATIENCE_S
        )
    assert healthy.returncode == 0
    assert [path.name for path in shared.parent.iterdir()] == ["invite.txt"]
    gone = subprocess.run([*PROGRAM, "health", "--state", str(tmp_path / "run")], check=False, timeout=PATIENCE_S)
    assert gone.returncode == 1


def test_a_coordinator_that_was_killed_comes_back_as_the_same_peer_of_the_same_run(tmp_path: Path) -> None:
    port = str(free_port())
    with coordinator(tmp_path, "--dht-port", port) as process:
        before = SwarmFile.read(tmp_path / "swarm.toml")
        process.kill()
        process.wait()
    with coordinator(tmp_path, "--dht-port", port):
        assert SwarmFile.read(tmp_path / "swarm.toml") == before


def test_the_runs_tokenizer_stays_in_the_cache_while_the_coordinator_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KILOHIVE_ASSETS_MAX_SIZE", "1KB")  # less than it takes
    (tmp_path / "tokenizer.json").write_bytes(tiny_tokenizer())
    with coordinator(tmp_path / "run", "--tokenizer", str(tmp_path / "tokenizer.json")):
        (stored,) = stored_assets(tmp_path / "cache" / "assets")
        assert stored.n_bytes == len(tiny_tokenizer()) > 1000
        assert not stored.remove()
    assert stored.remove()


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = [*PROGRAM, "coordinator", "--out", str(tmp_path), "--dht-port", str(port), "--log-level", "error"]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr


def test_the_last_port_is_taken_again_if_it_is_free(tmp_path: Path) -> None:
    with coordinator(tmp_path, "--dht-port", str(free_port())) as process:
        before = SwarmFile.read(tmp_path / "swarm.toml")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    kept = (tmp_path / "swarm.toml").read_bytes()
    arguments = [*PROGRAM, "coordinator", "--out", str(tmp_path), "--stop-on-stdin-eof"]
    # Standard input has ended already: it opens the run, writes the swarm file anew and leaves.
    subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=PATIENCE_S)
    assert (tmp_path / "swarm.toml").read_bytes() == kept
    assert SwarmFile.read(tmp_path / "swarm.toml") == before


def test_it_never_goes_where_the_runs_nodes_would_not_look(tmp_path: Path) -> None:
    with coordinator(tmp_path) as process:
        before = (tmp_path / "swarm.toml").read_bytes()
        process.kill()
        process.wait()
    port = SwarmFile.read(tmp_path / "swarm.toml").initial_peers[0].split("/")[4]
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind_when_free(taken, int(port))
        arguments = [*PROGRAM, "coordinator", "--out", str(tmp_path), "--log-level", "error"]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert (
            f"port {port} of 127.0.0.1, where the nodes of this run look for its coordinator, is in use"
            in result.stderr
        )
        assert "choose another port with --dht-port" in result.stderr
        assert (tmp_path / "swarm.toml").read_bytes() == before
        with coordinator(tmp_path, "--dht-port", str(free_port())):
            assert SwarmFile.read(tmp_path / "swarm.toml").initial_peers[0].split("/")[4] != port


def bind_when_free(listener: socket.socket, port: int) -> None:
    """p2pd of a coordinator that was killed ends a moment later."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            listener.listen()
            return


def test_health_asks_on_this_machine_and_never_dials_the_home_router(tmp_path: Path) -> None:
    with coordinator(tmp_path, "--announce", "192.0.2.1", "--dht-port", str(free_port())):
        assert SwarmFile.read(tmp_path / "swarm.toml").initial_peers[0].startswith("/ip4/192.0.2.1/tcp/")
        asked = [*PROGRAM, "health", "--state", str(tmp_path), "--timeout-s", "5"]
        assert subprocess.run(asked, check=False, timeout=PATIENCE_S).returncode == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--listen", "::1"), "/ip6/::1/tcp/"),
        (("--listen", "[::1]"), "/ip6/::1/tcp/"),
        (("--listen", "localhost", "--announce", "localhost"), "/dns/localhost/tcp/"),
    ],
)
def test_a_run_is_found_by_each_spelling_of_its_address(tmp_path: Path, flags: tuple[str, ...], told: str) -> None:
    with coordinator(tmp_path, *flags, "--dht-port", str(free_port())):
        assert SwarmFile.read(tmp_path / "swarm.toml").initial_peers[0].startswith(told)
        shown = status("--join", str(tmp_path / "swarm.toml"), "--json")
    assert json.loads(shown.stdout)["peers"]


def test_only_the_invited_take_part_in_a_closed_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with coordinator(run, "--experts", "8", "--experts-per-block", "2", "--admission"):
        swarm = SwarmFile.read(run / "swarm.toml")
        private = [run / name for name in ("admission.token", "swarm.toml", "invite.txt")]
        assert [path.stat().st_mode & 0o777 for path in private] == [0o600] * 3
        for flag, told in (("--swarm", "swarm.toml"), ("--join", "swarm.toml"), ("--join", "invite.txt")):
            shown = json.loads(status(flag, str(run / told), "--json").stdout)
            assert [peer["role"] for peer in shown["peers"]] == ["coordinator"]
        arguments = [*PROGRAM, "host", *named(swarm), "--state", str(tmp_path / "host")]
        uninvited = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert uninvited.returncode == 2
    assert "this run admits only those with its invite: join with it" in uninvited.stderr
    with coordinator(run):  # opened again without the flag, it is the same closed run
        assert SwarmFile.read(run / "swarm.toml").admission == swarm.admission != b""


async def test_status_of_a_swarm_that_is_gone_is_one_sentence() -> None:
    peer = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{Identity.generate().peer_id}"
    config = StatusConfig(run_id="demo-0123456789ab", initial_peers=(peer,), timeout_s=10.0)
    with pytest.raises(UnavailableError, match="initial peers: none answered"):
        await run_status(config, asyncio.Event())


def config_in(out: Path, **changes: Any) -> CoordinatorConfig:
    return CoordinatorConfig(out=out, experts=8, experts_per_block=2, **changes)


def test_a_run_keeps_its_manifest_and_its_owner(tmp_path: Path) -> None:
    first = open_run(config_in(tmp_path), "12D3KooWowner")
    assert open_run(config_in(tmp_path), "12D3KooWowner") == first
    assert open_run(CoordinatorConfig(out=tmp_path), "12D3KooWowner") == first
    with pytest.raises(ConfigError, match=r"belongs to 12D3KooWowner, but owner\.key in this folder is 12D3KooWother"):
        open_run(config_in(tmp_path), "12D3KooWother")
    with pytest.raises(ConfigError, match=r"model\.d_model: is 64, but the run in"):
        open_run(config_in(tmp_path, d_model=64), "12D3KooWowner")


def test_a_manifest_from_a_file_becomes_the_owners(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[model]\nd_model = 64\n', encoding="utf-8")
    manifest = open_run(CoordinatorConfig(out=tmp_path / "a", manifest=path), "12D3KooWowner")
    assert (manifest.name, manifest.owner, manifest.model.d_model) == ("mine", "12D3KooWowner", 64)
    path.write_text('name = "mine"\n[model]\nd_model = 32\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds run mine-.* already, not the one in"):
        open_run(CoordinatorConfig(out=tmp_path / "a", manifest=path), "12D3KooWowner")
    path.write_text('name = "mine"\nowner = "12D3KooWother"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="belongs to 12D3KooWother"):
        open_run(CoordinatorConfig(out=tmp_path / "b", manifest=path), "12D3KooWowner")
    path.write_text("name = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.toml: name: must be str"):
        open_run(CoordinatorConfig(out=tmp_path / "c", manifest=path), "12D3KooWowner")

"""What `health` makes of a folder: the files that nodes leave there, whole or damaged."""

from __future__ import annotations

import asyncio
import errno
import json
from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError, UnavailableError
from node.rpc import health
from node.rpc.config import HealthConfig
from node.rpc.health import read_admission, read_dht, read_server, run_health, server_told
from protocol.admission import OPEN, Admission
from protocol.endpoints import Address
from protocol.identity import peer_id_of
from protocol.swarm_file import SwarmFile

if TYPE_CHECKING:
    from pathlib import Path

PEER = peer_id_of(bytes(range(32)))  # always the same: it is in the names of tests
ADDRESS = Address(PEER, "127.0.0.1:4000")


def test_a_node_says_where_it_serves_while_it_does(tmp_path: Path) -> None:
    with server_told(tmp_path, ADDRESS):
        assert read_server(tmp_path / "server.json") == ADDRESS
    assert not list(tmp_path.iterdir())


def test_a_node_of_a_closed_run_says_its_token_too(tmp_path: Path) -> None:
    path, admission = tmp_path / "server.json", Admission("demo-1", bytes(range(32)))
    with server_told(tmp_path, ADDRESS, admission=admission):
        assert (read_server(path), read_admission(path)) == (ADDRESS, admission)
    with server_told(tmp_path, ADDRESS):
        assert read_admission(path) == OPEN
    path.write_text(json.dumps({"run_id": "demo-1", "admission": "x"}))
    with pytest.raises(ConfigError, match=r"server\.json: admission: must be 64 hexadecimal digits"):
        read_admission(path)


def test_a_full_disk_does_not_keep_a_node_from_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(health, "write_atomically", full)
    with server_told(tmp_path, ADDRESS):
        assert "will not find this node: No space left" in caplog.text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read"),
        ("[1]", "must have peer_id and endpoint, both text"),
        (json.dumps({"peer_id": PEER}), "must have peer_id and endpoint"),
        (json.dumps({"peer_id": PEER, "endpoint": 4000}), "both text"),
        (json.dumps({"peer_id": PEER, "endpoint": "127.0.0.1"}), "must name an address and a port"),
        (json.dumps({"peer_id": PEER, "endpoint": "127.0.0.1:70000"}), "a port up to 65535"),
        (json.dumps({"peer_id": "me", "endpoint": "127.0.0.1:4000"}), "is not an Ed25519 peer id"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "server.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"server.json: .*{problem}"):
        read_server(path)


def test_a_coordinators_own_address_comes_first_in_its_swarm_file(tmp_path: Path) -> None:
    path = tmp_path / "swarm.toml"
    peers = (f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}", f"/ip4/192.0.2.2/tcp/4002/p2p/{PEER}")
    SwarmFile(run_id="demo-1", initial_peers=peers).write(path)
    assert read_dht(path) == ("192.0.2.1", 4001)


@pytest.mark.parametrize("peer", [f"/p2p/{PEER}", f"/ip4/192.0.2.1/tcp/x/p2p/{PEER}"])
def test_a_swarm_file_without_a_port_is_named(tmp_path: Path, peer: str) -> None:
    path = tmp_path / "swarm.toml"
    SwarmFile(run_id="demo-1", initial_peers=(peer,)).write(path)
    with pytest.raises(ConfigError, match=r"swarm\.toml: must name an address and a port"):
        read_dht(path)


async def test_a_folder_without_a_node_is_unhealthy(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no node serves from this folder"):
        await run_health(HealthConfig(state=tmp_path), asyncio.Event())

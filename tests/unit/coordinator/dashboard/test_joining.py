"""What a page tells those who want to take part: never a secret, and commands that can be typed as they are."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest

import run_node
from common.command_line import parse
from coordinator.dashboard.config import DashboardConfig
from coordinator.dashboard.joining import WaysIn, ways_in
from protocol.identity import Identity
from protocol.invite import Invite
from protocol.manifest import Manifest
from protocol.swarm_file import SwarmFile

OWNER = Identity.generate()
MANIFEST = Manifest(name="demo", owner=OWNER.peer_id)
PEERS = (f"/ip4/192.0.2.1/tcp/4001/p2p/{OWNER.peer_id}",)
TOLD = Invite(run_id=MANIFEST.run_id, initial_peers=PEERS, owner=OWNER.peer_id)
TOKEN = bytes(range(32))
NOW_S = 1_800_000_000.0


def ways(told: Invite | SwarmFile | None = TOLD, **settings: Any) -> WaysIn:
    return ways_in(DashboardConfig(**settings), MANIFEST, PEERS, told)


def test_the_invite_leads_to_the_run() -> None:
    told = ways().as_json(NOW_S)
    assert Invite.decode(told["invite"], NOW_S) == TOLD
    assert (told["closed"], told["expired"]) == (False, False)


@pytest.mark.parametrize(
    "told",
    [
        replace(TOLD, admission=TOKEN),
        SwarmFile(run_id=MANIFEST.run_id, initial_peers=PEERS, owner=OWNER.peer_id, admission=TOKEN),
    ],
)
def test_of_a_closed_run_no_invite_is_shown_and_no_token_is_kept(told: Invite | SwarmFile) -> None:
    found = ways(told)
    shown = found.as_json(NOW_S)
    assert shown["closed"]
    assert (shown["invite"], shown["ways"]) == ("", [])
    assert TOKEN.hex() not in repr(found)


def test_an_invite_holds_for_no_longer_than_the_one_that_was_given() -> None:
    found = ways(replace(TOLD, expires_s=int(NOW_S) + 60))
    assert Invite.decode(found.as_json(NOW_S)["invite"], NOW_S).expires_s == NOW_S + 60
    late = found.as_json(NOW_S + 60)
    assert (late["expired"], late["invite"], late["ways"]) == (True, "", [])


def test_a_run_that_was_named_by_its_id_has_an_invite_too() -> None:
    assert Invite.decode(ways(None).as_json(NOW_S)["invite"], NOW_S) == TOLD


def test_every_command_is_one_of_ours_with_the_invite() -> None:
    (host,) = [command for command in run_node.COMMANDS if command.name == "host"]
    told = ways(package="https://example.org/kilohive-1-py3-none-any.whl", image="example.org/kilohive:1").as_json(
        NOW_S
    )
    assert [way["name"] for way in told["ways"]] == ["pip", "uvx", "Docker", "systemd"]
    for way in told["ways"]:
        (line,) = [line for line in way["text"].splitlines() if " host --join " in line]
        words = shlex.split(line)
        config = parse(
            host, words[words.index("host", words.index("--network") + 2 if "docker" in words else 0) + 1 :], ""
        )
        assert config.config.join == told["invite"]


@pytest.mark.parametrize("name", ["kilohive; rm -rf /", "$(id)", "a b"])
def test_what_the_owner_calls_the_package_is_one_word_of_a_shell(name: str) -> None:
    for way in ways(package=name, image=name).as_json(NOW_S)["ways"]:
        line = next(line for line in way["text"].splitlines() if name in line)
        assert name in shlex.split(line)

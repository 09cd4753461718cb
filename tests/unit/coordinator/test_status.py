"""The tables of `status`, from views of the directory."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from rich.console import Console

from common.text import moment_text
from coordinator.figures import largest_divergence, largest_gap
from coordinator.status import status_json
from coordinator.tables import MAX_PAUSED_SHOWN, MAX_PEERS_SHOWN, bytes_text, render_status
from dht.view import DirectoryView
from protocol.manifest import BlockId, all_blocks
from tests.support.run_views import MANIFEST, averaged, peer_info, replica, view
from tests.support.trainer_events import PEERS


def shown(taken: DirectoryView, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(render_status(MANIFEST, taken))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize("width", [100, 120])
def test_a_whole_swarm(width: int) -> None:
    lines = shown(view(), width).splitlines()
    assert lines[0] == f"run {MANIFEST.run_id}"
    host = next(line for line in lines if "…3VdZ01" in line)
    assert host.split() == (
        ["…3VdZ01", "host", "127.0.0.1:40001", "0/4-7,1/4-7", "1,320", "2,048", "3.2", "12.3", "MB", "1:40"]
    )
    layer = next(line for line in lines if line.strip().startswith("0 "))
    assert layer.split() == ["0", "16", "of", "16", "1" * 16, "-", "100", "to", "103", "-", "-", "4", "40"]
    assert "all 32 blocks have a live replica" in lines[-1]


def test_replicas_and_how_far_they_are_apart() -> None:
    lines = shown(averaged()).splitlines()
    layer = next(line for line in lines if line.strip().startswith("0 "))
    words = ["0", "16", "of", "16", "2" * 16, "1", "1,000", "to", "1,035", "21", "0.05", "6", "60"]
    assert layer.split() == words
    assert "2 replicas of each block wanted; exchanges every 1 s in fp32" in lines
    assert lines[-4:] == [
        "being downloaded: 0/3",
        "stored, not served: 1/7",
        "2 replicas of the trunk, 3 steps apart",
        "all 32 blocks have a live replica",
    ]


def test_trainers_with_their_trunks_and_tokens() -> None:
    lines = shown(averaged()).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("trainer "))
    assert [line.split() for line in lines[start + 1 : start + 4]] == [
        ["…3VdZ20", "serving", "400", "0.0023", "61,440", "7"],
        ["…3VdZ21", "serving", "397", "0", "61,440", "7"],
        ["…3VdZ22", "-", "-", "-", "61,440", "7"],
    ]


def test_a_narrow_terminal_cuts_no_block_away() -> None:
    text = shown(averaged(), width=80)
    assert sum(line.count("2222") for line in text.splitlines()) >= 4


def test_a_gap_is_between_replicas_of_one_block() -> None:
    old, new = replica(BlockId(0, 0), 1, 5), replica(BlockId(0, 0), 2, 9, divergence=0.5)
    alone = replica(BlockId(0, 1), 1, 100, divergence=0.75)  # of a partner that is gone
    assert largest_gap([(old, new), (alone,)]) == 4
    assert largest_divergence([(old, new), (alone,)]) == 0.5
    assert largest_gap([(old,), (alone,), ()]) is None
    assert largest_divergence([(alone,)]) is None


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_345_678, "12.3 MB"),
        (999_999_999, "1.0 GB"),
        (123_456_789, "123 MB"),
        ((1 << 63) - 1, "9,223,372 TB"),
    ],
)
def test_bytes_as_a_person_reads_them(n_bytes: int, text: str) -> None:
    assert bytes_text(n_bytes) == text


def test_lost_blocks_are_counted_and_named() -> None:
    text = shown(view(dead=frozenset({2})))
    assert "8 of 32 blocks have no live replica: 0/8-11,1/8-11" in text
    assert "12 of 16" in text
    assert "1111111100001111" in text


def test_an_empty_swarm_says_so() -> None:
    empty = DirectoryView(taken_s=1000.0, replicas=MappingProxyType(dict.fromkeys(all_blocks(MANIFEST.model), ())))
    text = shown(empty)
    assert "no peer is announced" in text
    assert "32 of 32 blocks have no live replica: 0/0-15,1/0-15" in text


def test_many_replicas_and_many_peers_stay_readable() -> None:
    block = BlockId(0, 0)
    crowded = {**view().replicas, block: tuple(replica(block, i, 1) for i in range(12))}
    taken = view(n_more_peers=MAX_PEERS_SHOWN)
    text = shown(DirectoryView(taken_s=1000.0, replicas=MappingProxyType(crowded), peers=taken.peers))
    assert "+111" in text
    assert "and 6 more peers" in text


def test_json_holds_everything_and_is_json() -> None:
    taken = view(dead=frozenset({2}))
    table = json.loads(json.dumps(status_json(MANIFEST, taken)))
    assert table["run_id"] == MANIFEST.run_id
    assert table["blocks"] == 32
    assert table["blocks_lost"] == [f"{layer}/{block}" for layer in range(2) for block in range(8, 12)]
    assert len(table["replicas"]) == 24
    assert table["replicas"][0]["block"] == "0/0"
    assert {peer["role"] for peer in table["peers"]} == {"host", "trainer", "coordinator"}
    assert (table["others"], table["trunk"]) == ([], [])


def test_json_tells_of_averaging() -> None:
    table = json.loads(json.dumps(status_json(MANIFEST, averaged()), allow_nan=False))
    assert [(row["block"], row["state"]) for row in table["others"]] == [("0/3", "joining"), ("1/7", "stored")]
    assert [(row["block"], row["version"], row["divergence"]) for row in table["trunk"]] == (
        [("trunk", 400, 0.0023), ("trunk", 397, 0.0)]
    )
    assert (table["version_gap_max"], table["divergence_max"]) == (21, 0.05)
    assert len(table["replicas"]) == 64
    assert {row["state"] for row in table["replicas"]} == {"serving"}
    host, trainer = table["peers"][0], table["peers"][-1]
    assert (host["staleness"], host["exchanged_bytes"], trainer["own_tokens"]) == (3.25, 12_345_678, 61_440)
    assert table["manifest"]["averaging"]["target_replicas"] == 2


def test_a_host_that_nobody_can_call_is_shown_as_such() -> None:
    lost = replace(peer_info(0), reachability="not reached")
    assert f"{lost.endpoint}, not reached" in shown(replace(view(), peers=(lost,)), width=140)


def test_a_paused_host_is_shown_as_such() -> None:
    resting = replace(peer_info(0, n_blocks=0), paused=True)
    text = shown(replace(view(), peers=(resting,)), width=140)
    assert " paused " in next(line for line in text.splitlines() if "host " in line)
    assert "paused:" not in text, "of an older version, which says no more"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"pause_cause": "owner", "paused_since_s": 1e9}, f"by its owner since {moment_text(1e9)}"),
        (
            {"pause_cause": "owner", "paused_since_s": 1e9, "paused_until_s": 1.00001e9},
            f"by its owner since {moment_text(1e9)} until {moment_text(1.00001e9)}",
        ),
        ({"pause_cause": "condition"}, "by its owner's conditions"),
        ({"pause_cause": "device"}, "as its device fails"),
        ({"pause_cause": "sleep"}, "after a sleep"),
    ],
)
def test_what_a_paused_host_says_of_that_is_shown_below_the_tables(told: dict[str, Any], words: str) -> None:
    resting = replace(peer_info(0, n_blocks=0), paused=True, **told)
    lines = [line.rstrip() for line in shown(replace(view(), peers=(resting,)), width=80).splitlines()]
    assert f"paused: …{PEERS[0][-6:]} {words}" in lines


def test_of_many_paused_hosts_some_are_shown_and_all_are_counted() -> None:
    resting = [replace(peer_info(i, n_blocks=0), paused=True, pause_cause="owner") for i in range(MAX_PAUSED_SHOWN + 5)]
    text = shown(replace(view(), peers=tuple(resting)))
    assert text.count("paused: …") == MAX_PAUSED_SHOWN
    assert "and 5 more hosts are paused" in text

"""What a page is given: the run's numbers, and never more of them than fit, however large the run is."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from common.errors import InvalidInputError
from coordinator.dashboard import answers
from coordinator.dashboard.answers import MAX_CELLS, MAX_NAMED, ROWS, encoded
from coordinator.dashboard.history import COLUMNS, MAX_POINTS, Curves
from coordinator.dashboard.snapshot import Snapshot, take_snapshot
from coordinator.status import status_json
from dht.view import DirectoryView
from protocol.limits import MAX_LAYERS
from protocol.manifest import BlockId, all_blocks
from tests.support.run_views import (
    CROWD,
    MANIFEST,
    averaged,
    crowd,
    crowd_id,
    peer_info,
    replica,
    reported,
    view,
)
from tests.support.trainer_events import PEERS

KB = 1000


def small() -> Snapshot:
    return take_snapshot(MANIFEST, replace(averaged(), reports=(reported(20),)))


@pytest.fixture(scope="module")
def crowded() -> Snapshot:
    return take_snapshot(CROWD, crowd())


def as_sent(value: dict[str, Any] | None) -> dict[str, Any]:
    sent: dict[str, Any] = json.loads(encoded(value))
    return sent


def test_the_overview_has_the_numbers_of_status() -> None:
    snapshot = small()
    told = as_sent(answers.overview(snapshot, ""))
    listed = status_json(MANIFEST, snapshot.view)
    assert told["figures"] == json.loads(encoded(listed["figures"]))
    assert told["run_id"] == listed["run_id"]
    assert told["layers"]["version_max"] == [layer["version_max"] for layer in listed["layers"]]  # type: ignore[attr-defined]
    assert told["layers"]["live"] == told["layers"]["blocks"] == [16, 16]
    assert told["cells"] == {"group": 1, "layers": ["2" * 16, "2" * 16]}
    assert (told["silent"], told["lost"], told["problem"]) == ([], "", "")


def test_the_overview_names_what_needs_attention() -> None:
    taken = view(dead=frozenset({2}))
    late = tuple(replace(peer, expiration_s=taken.taken_s + 5) for peer in taken.peers)
    told = answers.overview(take_snapshot(MANIFEST, replace(taken, peers=late)), "the DHT does not answer")
    assert told["lost"] == "0/8-11,1/8-11"
    assert [row["heard_s"] for row in told["silent"]] == [15.0] * 5
    assert told["problem"] == "the DHT does not answer"
    assert told["cells"]["layers"][0] == "1111111100001111"


def test_a_run_that_nobody_is_in_is_shown_as_such() -> None:
    nobody = DirectoryView(replicas=MappingProxyType(dict.fromkeys(all_blocks(MANIFEST.model), ())))
    told = as_sent(answers.overview(take_snapshot(MANIFEST, nobody), ""))
    assert told["figures"]["held_out_bits_per_byte"] is None
    assert told["cells"]["layers"] == ["0" * 16] * 2
    assert answers.peers(take_snapshot(MANIFEST, nobody), "all", "", 1) == {
        "total": 0,
        "page": 1,
        "pages": 1,
        "rows": [],
    }


def test_peers_come_by_their_tokens_and_have_a_rank_in_their_role() -> None:
    hosts = {block: (replace(row[0], tokens_total=int(row[0].peer_id[-2:])),) for block, row in view().replicas.items()}
    snapshot = take_snapshot(MANIFEST, replace(view(), replicas=MappingProxyType(hosts)))
    rows = answers.peers(snapshot, "host", "", 1)["rows"]
    assert [(row["rank"], row["peer_id"], row["tokens"]) for row in rows] == [
        (1, PEERS[3], 3),
        (2, PEERS[2], 2),
        (3, PEERS[1], 1),
        (4, PEERS[0], 0),
    ]
    assert [row["role"] for row in answers.peers(snapshot, "all", "", 1)["rows"]] == [
        "trainer",
        *["host"] * 4,
        "coordinator",
    ]


@pytest.mark.parametrize(
    ("search", "found"), [("dz02", [2]), ("  DZ02 ", [2]), (":40001", [1]), ("nobody", []), ("", [0, 1, 2, 3])]
)
def test_a_search_looks_in_ids_and_addresses(search: str, found: list[int]) -> None:
    rows = answers.peers(take_snapshot(MANIFEST, view()), "host", search, 1)["rows"]
    assert sorted(row["peer_id"] for row in rows) == [PEERS[index] for index in found]


def test_a_search_is_bounded() -> None:
    with pytest.raises(InvalidInputError, match="search: must be at most 100 characters, is 101"):
        answers.peers(small(), "all", "x" * 101, 1)


@pytest.mark.parametrize(
    ("page", "shown", "n_rows"), [(1, 1, ROWS), (2, 2, ROWS), (0, 1, ROWS), (-5, 1, ROWS), (10**9, 180, ROWS)]
)
def test_a_page_that_is_not_there_is_the_nearest_one(crowded: Snapshot, page: int, shown: int, n_rows: int) -> None:
    told = answers.peers(crowded, "host", "", page)
    assert (told["total"], told["page"], told["pages"], len(told["rows"])) == (9000, shown, 180, n_rows)


def test_a_host_is_shown_with_its_blocks_beside_the_other_replicas() -> None:
    told = as_sent(answers.peer(small(), PEERS[2], 1))
    assert (told["role"], told["blocks"], told["report"], told["trunk"]) == ("host", 11, None, None)
    assert (told["joining"], told["stored"]) == (0, 1)
    assert told["hosted"] == "0/11-15,1/10-15"
    first = told["replicas"]["rows"][0]
    assert (first["block"], first["version"], first["behind"], first["replicas"]) == ("0/11", 1014, 21, 2)


def test_a_trainer_is_shown_with_its_trunk_and_what_it_reports() -> None:
    told = as_sent(answers.peer(small(), PEERS[20], 1))
    assert told["trunk"] == {"version": 400, "divergence": 0.0023}
    assert told["report"]["held_out_bits_per_byte"] == [8.0, 4.0]
    assert told["staleness"] is None
    assert as_sent(answers.peer(small(), PEERS[22], 1))["report"] is None


@pytest.mark.parametrize("peer_id", ["", "nobody", "x" * 10_000, "<script>"])
def test_a_peer_that_is_not_announced_is_nothing(peer_id: str) -> None:
    assert answers.peer(small(), peer_id, 1) is None


def test_a_layer_is_shown_with_its_blocks_and_how_each_trainer_sees_its_load() -> None:
    told = as_sent(answers.layer(small(), 1, 1))
    assert (told["figures"]["layer"], told["figures"]["live"], told["figures"]["blocks"]) == (1, 16, 16)
    assert told["trainers"] == [{"peer_id": PEERS[20], "load_entropy_bits": 8.5, "load_cv": 0.75, "dead_experts": 10}]
    row = told["blocks"]["rows"][0]
    assert (row["block"], row["replicas"], row["version_min"], row["version_max"], row["gap"]) == (
        ("1/0", 2, 1000, 1021, 21)
    )
    assert row["hosts"] == [PEERS[0], PEERS[3]]


@pytest.mark.parametrize("number", [-1, 2, 10**12])
def test_a_layer_that_the_run_does_not_have_is_refused(number: int) -> None:
    with pytest.raises(InvalidInputError, match=f"layer: must be from 0 to 1, is {number}"):
        answers.layer(small(), number, 1)


def test_a_block_with_many_replicas_names_a_few() -> None:
    block = BlockId(0, 0)
    many = {**view().replicas, block: tuple(replica(block, index, 1) for index in range(12))}
    told = answers.layer(take_snapshot(MANIFEST, replace(view(), replicas=MappingProxyType(many))), 0, 1)
    assert told["cells"]["layers"][0][:2] == "+1"
    assert told["blocks"]["rows"][0]["replicas"] == 12
    assert len(told["blocks"]["rows"][0]["hosts"]) == MAX_NAMED


def test_all_answers_of_a_crowded_run_are_small(crowded: Snapshot) -> None:
    assert (len(crowded.peers), crowded.figures.blocks) == (10_000, 20_000)
    overview = answers.overview(crowded, "")
    assert sum(map(len, overview["cells"]["layers"])) <= MAX_CELLS
    assert overview["cells"]["group"] == 5
    assert len(encoded(overview)) < 12 * KB
    assert len(encoded(answers.peers(crowded, "all", "", 1))) < 24 * KB
    assert len(encoded(answers.peers(crowded, "host", "00000", 3))) < 24 * KB
    assert len(encoded(answers.peer(crowded, crowd_id(5000), 1))) < 4 * KB
    assert len(encoded(answers.peer(crowded, crowd_id(5), 1))) < 4 * KB
    assert len(encoded(answers.layer(crowded, 7, 4))) < 32 * KB


def test_a_host_that_says_it_holds_every_block_is_shown_in_parts() -> None:
    taken, greedy = crowd(20), crowd_id(1)
    everywhere = {block: (*row, replace(row[0], peer_id=greedy)) for block, row in taken.replicas.items()}
    snapshot = take_snapshot(CROWD, replace(taken, replicas=MappingProxyType(everywhere)))
    told = as_sent(answers.peer(snapshot, greedy, 2))
    assert (told["replicas"]["pages"], len(told["replicas"]["rows"])) == (400, ROWS)
    assert len(encoded(told)) < 12 * KB


def test_the_overview_of_a_run_with_as_many_layers_as_there_may_be_is_small() -> None:
    model = replace(MANIFEST.model, n_layers=MAX_LAYERS)
    manifest = replace(MANIFEST, model=model)
    told = answers.overview(take_snapshot(manifest, crowd(100, manifest)), "")
    assert len(encoded(told)) < 48 * KB


def test_a_long_history_is_small() -> None:
    t_s = tuple(range(1_800_000_000, 1_800_000_000 + MAX_POINTS))
    full = Curves(t_s=t_s, figures=dict.fromkeys(COLUMNS, (1 / 3,) * MAX_POINTS))
    evaluations = [(10**12 + number, 1 / 3) for number in range(MAX_POINTS)]
    assert len(encoded(answers.curves(full, evaluations))) < 128 * KB


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (1 / 3, b"0.333333"),
        (1_800_000_000.25, b"1800000000.2"),
        (1 << 62, b"4611686018427387904"),
        (0.0, b"0"),
        (2e15, b"2000000000000000"),
    ],
)
def test_fractions_are_short_and_times_and_counts_whole(value: float, sent: bytes) -> None:
    assert encoded({"x": [value]}) == b'{"x":[' + sent + b"]}"


def test_a_relay_and_a_peer_behind_one_are_named() -> None:
    behind = replace(peer_info(0), endpoint=f"relay:{PEERS[1]},{PEERS[2]}", reachability="relayed")
    told = answers.peers(take_snapshot(MANIFEST, replace(view(), peers=(behind,))), "all", "", 1)
    assert told["rows"][0]["endpoint"] == "relayed by …3VdZ01 and …3VdZ02"

"""A run in numbers, as `status` and the run's page both have them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import MappingProxyType

import pytest

from coordinator.figures import SILENT_S, LayerFigures, RunFigures, layer_figures, peer_figures, run_figures
from coordinator.status import status_json
from dht.record_versions import PERIOD_S, TTL_S
from dht.view import DirectoryView
from protocol.manifest import all_blocks
from tests.support.run_views import MANIFEST, averaged, peer_info, reported, view


def figures(taken: DirectoryView) -> RunFigures:
    return run_figures(MANIFEST, taken, layer_figures(MANIFEST, taken))


def layers(taken: DirectoryView) -> tuple[LayerFigures, ...]:
    return layer_figures(MANIFEST, taken)


def test_peers_blocks_and_experts_are_counted() -> None:
    found = figures(view(dead=frozenset({2})))
    assert found.peers == {"host": 3, "trainer": 1, "coordinator": 1, "lighthouse": 0}
    assert (found.blocks, found.blocks_lost, found.replicas_min, found.replicas_mean) == (32, 8, 0, 0.75)
    assert (found.experts, found.experts_alive) == (1024, 768)
    assert (found.silent, found.paused, found.target_replicas) == (0, 0, MANIFEST.averaging.target_replicas)


def test_an_empty_run_has_figures_and_says_of_what_nobody_told_that_it_is_unknown() -> None:
    found = figures(DirectoryView(replicas=MappingProxyType(dict.fromkeys(all_blocks(MANIFEST.model), ()))))
    unknown = {name for name, value in asdict(found).items() if value is None}
    assert unknown == {
        "held_out_bits_per_byte",
        "held_out_tokens",
        "train_bits_per_byte",
        "load_entropy_bits",
        "load_cv",
        "dead_experts",
        "staleness",
        "version_gap",
        "divergence",
        "trunk_version_gap",
        "trunk_divergence",
        "calls_ok",
        "calls_failed",
        "wire_bytes",
    }
    assert (found.blocks_lost, found.experts_alive, found.tokens_per_s) == (32, 0, 0)


def test_what_trainers_report_is_summed_or_averaged() -> None:
    second = reported(21, calls_failed=5, train_bits_per_byte=4.5, load_entropy_bits=(7.0, 7.5), dead_experts=(4, 3))
    taken = replace(averaged(), reports=(reported(20), second))
    found = figures(taken)
    assert (found.calls_ok, found.calls_failed, found.wire_bytes) == (640, 7, 168_000_000)
    assert (found.train_bits_per_byte, found.load_entropy_bits, found.load_cv) == (4.0, 7.75, 0.5)
    assert found.dead_experts == 2 + 3  # in each layer those of the trainer that has the fewest
    assert [layer.load_entropy_bits for layer in layers(taken)] == [7.5, 8.0]
    assert [layer.dead_experts for layer in layers(taken)] == [2, 3]


def test_the_latest_evaluation_counts_and_of_two_at_the_same_tokens_the_lower() -> None:
    late = reported(21, evaluated_tokens=(30_000,), held_out_bits_per_byte=(5.0,))
    lower = reported(22, evaluated_tokens=(30_000,), held_out_bits_per_byte=(4.5,))
    never = reported(23, evaluated_tokens=(), held_out_bits_per_byte=())
    for reports, expected in (
        ((), (None, None)),
        ((never,), (None, None)),
        ((reported(20), never), (4.0, 20_480)),
        ((reported(20), late, lower), (4.5, 30_000)),
        ((lower, late), (4.5, 30_000)),
    ):
        found = figures(replace(averaged(), reports=reports))
        assert (found.held_out_bits_per_byte, found.held_out_tokens) == expected


def test_a_trainer_without_a_report_counts_with_its_mean_speed() -> None:
    taken = averaged()  # three trainers of 1,320.4 tokens a second over the run
    assert figures(taken).tokens_per_s == pytest.approx(3 * 1320.4)
    assert figures(replace(taken, reports=(reported(20),))).tokens_per_s == pytest.approx(5000 + 2 * 1320.4)
    stranger = reported(40, tokens_per_s=1e9)  # it reports, and is no peer of the run
    assert figures(replace(taken, reports=(stranger,))).tokens_per_s == pytest.approx(3 * 1320.4)


def test_a_report_about_another_number_of_layers_says_nothing_of_ours() -> None:
    strange = reported(20, load_entropy_bits=(1.0,), load_cv=(1.0,), dead_experts=(1,))
    assert [layer.load_cv for layer in layers(replace(averaged(), reports=(strange,)))] == [None, None]


def test_a_layer_has_its_replicas_versions_and_load() -> None:
    (first, _) = layers(averaged())
    assert first.replicas == (2,) * 16
    assert (first.live, first.joining, first.hosts, first.queue_tokens) == (16, 1, 6, 60)
    assert (first.version_min, first.version_max, first.gap, first.divergence) == (1000, 1035, 21, 0.05)
    assert first.tokens_per_s == pytest.approx(6 * 100.5)


def test_trunks_are_compared_apart_from_blocks() -> None:
    found = figures(averaged())
    assert (found.version_gap, found.trunk_version_gap, found.trunk_divergence) == (21, 3, 0.0023)


def test_a_peer_that_has_not_renewed_its_record_is_silent_before_it_is_forgotten() -> None:
    now_s = view().taken_s
    fresh = replace(peer_info(0), expiration_s=now_s + TTL_S)
    late = replace(peer_info(1), expiration_s=now_s + TTL_S - SILENT_S - 0.5)
    durable = replace(peer_info(2), expiration_s=now_s + 300)
    taken = replace(view(), peers=(fresh, late, durable))
    assert [row.is_silent for row in peer_figures(taken)] == [False, True, False]
    assert [row.heard_s for row in peer_figures(taken)] == [0.0, SILENT_S + 0.5, 0.0]
    assert figures(taken).silent == 1
    assert PERIOD_S < SILENT_S <= 10 - PERIOD_S / 2


def test_a_host_has_answered_what_its_replicas_say_and_a_trainer_trained_what_it_says() -> None:
    tokens = {row.peer.role: row.tokens for row in peer_figures(view())}
    assert tokens == {"host": 5, "trainer": 61_440, "coordinator": 0}
    assert [len(row.replicas) for row in peer_figures(averaged())[:6]] == [10, 11, 11, 10, 11, 11]


def test_status_prints_these_figures_as_json() -> None:
    taken = replace(averaged(), reports=(reported(20),))
    table = json.loads(json.dumps(status_json(MANIFEST, taken), allow_nan=False))
    assert table["figures"] == json.loads(json.dumps(asdict(figures(taken))))
    assert [layer["replicas"] for layer in table["layers"]] == [[2] * 16] * 2
    assert table["reports"][0]["said"]["held_out_bits_per_byte"] == [8.0, 4.0]

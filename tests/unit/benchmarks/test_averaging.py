"""The parts of the averaging benchmark that are no process: who agrees when, what is sent, what a row says."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import averaging, meters
from tests.benchmarks.averaging_fleet import FAULT_LIMIT_S, Round, begun_after
from tests.benchmarks.averaging_parts import (
    BLOCK_SHAPE,
    SAMPLED,
    Answers,
    Change,
    Samples,
    agreed_at_s,
    change_of,
    sampled,
    start_tensors,
    values_per_tensor,
    worst_distance,
)

SOCKETS = """\
ESTAB 0 0 127.0.0.1:4001 127.0.0.1:50000 users:(("p2pd",pid=11,fd=8)) cubic rto:204 bytes_sent:300 bytes_acked:300
ESTAB 0 0 127.0.0.1:50000 127.0.0.1:4001 users:(("p2pd",pid=12,fd=9)) cubic rto:204 bytes_sent:70 bytes_acked:70
ESTAB 0 0 127.0.0.1:4002 127.0.0.1:50001 users:(("p2pd",pid=11,fd=10)) cubic rto:204
ESTAB 0 0 10.0.0.2:22 10.0.0.1:50002 users:(("sshd",pid=111,fd=4)) cubic rto:204 bytes_sent:9999
""".splitlines()


def change(at_s: float, peer: int, *values: float, offset: int = 0) -> Change:
    return Change(at_s=at_s, peer=peer, offset=offset, values_S=np.array(values, dtype=np.float32))


def test_every_peer_and_round_starts_elsewhere_and_both_contenders_alike() -> None:
    starts = {(seed, peer): next(start_tensors(1, seed, peer)) for seed in (0, 1) for peer in (0, 1)}
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(starts.values(), 2))
    assert np.array_equal(starts[0, 1], next(start_tensors(10, 0, 1)))
    assert starts[0, 0].shape == BLOCK_SHAPE


@pytest.mark.parametrize("blocks", [1, 10])
def test_a_block_is_one_megabyte_and_a_sample_has_its_size_at_any_number_of_blocks(blocks: int) -> None:
    tensors = list(start_tensors(blocks, 0, 0))
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(blocks * 1e6, rel=1e-3)
    assert SAMPLED * 0.9 < sampled(tensors, values_per_tensor(blocks)).size <= SAMPLED


def test_a_sample_tells_the_distance_of_whole_tensors() -> None:
    one, other = (list(start_tensors(1, 0, peer)) for peer in (0, 1))
    near = [a + 0.02 * b for a, b in zip(one, other, strict=True)]
    full = worst_distance([np.concatenate([t.reshape(-1) for t in near])], np.concatenate([t.reshape(-1) for t in one]))
    seen = worst_distance([sampled(near, values_per_tensor(1))], sampled(one, values_per_tensor(1)).astype(np.float64))
    assert full == pytest.approx(0.02, rel=1e-2)
    assert seen == pytest.approx(full, rel=5e-2)


def test_the_worst_peer_decides_the_distance() -> None:
    target_S = np.array([3.0, 4.0])
    samples = [np.array([3.0, 4.0], dtype=np.float32), np.array([3.0, 4.5], dtype=np.float32)]
    assert worst_distance(samples, target_S) == pytest.approx(0.1)
    assert worst_distance(samples) == pytest.approx(0.25 / np.linalg.norm([3.0, 4.25]))


def test_peers_have_agreed_when_the_last_of_them_has_come_near() -> None:
    changes = [change(1.0, 0, 0.0), change(1.0, 1, 2.0), change(3.0, 1, 1.0), change(2.0, 0, 1.005)]
    assert agreed_at_s(changes, (0, 1), np.array([1.0]), since_s=0.0) == 3.0


def test_who_was_near_and_went_away_again_does_not_agree() -> None:
    changes = [change(1.0, 0, 1.0), change(2.0, 0, 5.0), change(3.0, 1, 1.0)]
    assert agreed_at_s(changes, (0, 1), np.array([1.0]), since_s=0.0) is None
    assert agreed_at_s([*changes, change(4.0, 0, 1.0)], (0, 1), np.array([1.0]), since_s=0.0) == 4.0


def test_the_frozen_peer_is_not_asked_and_the_others_may_agree_on_anything() -> None:
    changes = [
        change(1.0, 0, 1.0),
        change(1.0, 1, 2.0),
        change(1.0, 2, 50.0),
        change(4.0, 0, 7.0),
        change(5.0, 1, 7.01),
    ]
    assert agreed_at_s(changes, (0, 1), None, since_s=2.0) == 5.0
    assert agreed_at_s(changes, (0, 1, 2), None, since_s=2.0) is None


def test_an_agreement_from_before_the_fault_does_not_count() -> None:
    changes = [change(1.0, 0, 1.0), change(1.5, 1, 1.0), change(4.0, 0, 9.0), change(5.0, 1, 9.0)]
    assert agreed_at_s(changes, (0, 1), None, since_s=2.0) == 5.0


def test_a_block_that_moved_replaces_its_part_of_the_sample() -> None:
    samples = Samples()
    for part in (
        change(0.0, 0, 1.0, 2.0, 3.0, 4.0),
        change(1.0, 0, 8.0, 9.0, offset=2),
        change(1.0, 1, 1.0, 2.0, 8.0, 9.0),
    ):
        samples.put(part)
    assert np.array_equal(samples.mean(), [1.0, 2.0, 8.0, 9.0])
    assert samples.agree((0, 1), None)


def test_a_sample_crosses_the_pipe_as_it_is() -> None:
    stream = io.StringIO()
    values_S = np.array([1.5, -2.25, 1e-30], dtype=np.float32)
    Answers(stream).say_sample(5, values_S, offset=7)
    said = json.loads(stream.getvalue())
    assert change_of(said, peer=3, seed=4) is None, "of the round before"
    heard = change_of(said, peer=3, seed=5)
    assert heard is not None
    assert (heard.peer, heard.offset) == (3, 7)
    assert np.array_equal(heard.values_S, values_S)
    assert heard.at_s > 0


def test_bytes_are_those_of_the_peers_sockets_alone() -> None:
    assert meters.bytes_sent(SOCKETS, {11, 12}) == {
        ("127.0.0.1:4001", "127.0.0.1:50000"): 300,
        ("127.0.0.1:50000", "127.0.0.1:4001"): 70,
        ("127.0.0.1:4002", "127.0.0.1:50001"): 0,
    }


def test_a_connection_that_replaced_another_counts_from_zero() -> None:
    before = {("a", "b"): 100, ("c", "d"): 50, ("gone", "x"): 9}
    assert meters.grown(before, {("a", "b"): 130, ("c", "d"): 20, ("e", "f"): 5}) == 30 + 20 + 5


def test_this_process_has_memory_and_one_that_is_not_has_none() -> None:
    assert meters.pss_bytes(os.getpid()) > 1e6
    assert meters.pss_bytes(1 << 30) == 0


def test_exchanges_begun_after_the_agreement_cost_nothing() -> None:
    dialled = [
        {"at_s": at_s, "value": {"seconds": 2.0, "bytes": n_bytes}} for at_s, n_bytes in ((9, 1), (11, 2), (13, 4))
    ]
    assert begun_after(dialled, 10.0) == 4
    assert begun_after(dialled, 8.0) == 2 + 4


def some_rounds(scale: float) -> list[Round]:
    generator = random.Random(0)
    return [
        Round(
            agreed=scale < 5,
            seconds=scale * generator.random(),
            sent_bytes=scale * 1e6,
            rest_bytes=scale * 2e6,
            peak_bytes=scale * 3e6,
        )
        for _ in range(3)
    ]


def test_a_case_has_time_and_bytes_of_timed_rounds_and_memory_of_watched_ones() -> None:
    ours, theirs = (some_rounds(1.0), some_rounds(10.0)), (some_rounds(2.0), some_rounds(40.0))
    rows = {row.metric: row for row in averaging.rows_of("1 MB, 2 peers", ours, theirs)}
    assert rows[averaging.SECONDS].ratio == 0.5
    assert (rows[averaging.SENT].ours, rows[averaging.SENT].theirs) == (1.0, 2.0)
    assert (rows[averaging.REST].ours, rows[averaging.REST].theirs) == (20.0, 80.0)
    assert (rows[averaging.PEAK].ours, rows[averaging.PEAK].theirs) == (30.0, 120.0)


def test_rounds_that_never_agreed_are_told() -> None:
    rounds = {"ours": some_rounds(1.0), "hivemind": some_rounds(10.0)}
    assert averaging.missed(rounds, 80.0) == "hivemind not within 80 s in 3 of 3 rounds"
    assert averaging.missed({"ours": rounds["ours"]}, 80.0) == ""


def test_a_fault_that_nobody_recovered_from_says_so() -> None:
    row = averaging.fault_row("case", [3.0, 4.0, 5.0], [FAULT_LIMIT_S, 20.0, FAULT_LIMIT_S])
    assert (row.ours, row.theirs) == (4.0, FAULT_LIMIT_S)
    assert row.note == f"hivemind not within {FAULT_LIMIT_S:.0f} s in 2 of 3 runs"
    assert averaging.fault_row("case", [3.0], [20.0]).note == ""


def test_the_sizes_of_the_issue_are_measured_five_times_but_the_largest() -> None:
    default = averaging.AveragingBenchmark(json=Path("x"))
    assert averaging.numbers(default.sizes_mb, "--sizes-mb") == [1, 10, 100]
    assert averaging.numbers(default.peers, "--peers") == [2, 4, 8]
    few = {(size, n): averaging.counted_runs(size, n, default.runs) for size in (1, 10, 100) for n in (2, 4, 8)}
    assert {case: runs for case, runs in few.items() if runs < averaging.MIN_RUNS} == {
        (100, 2): 2,
        (100, 4): 1,
        (100, 8): 1,
    }


@pytest.mark.parametrize("text", ["", "0", "1,x", "-2", "1.5"])
def test_sizes_that_are_no_numbers_are_refused_by_flag(text: str) -> None:
    with pytest.raises(SystemExit, match="--peers"):
        averaging.numbers(text, "--peers")

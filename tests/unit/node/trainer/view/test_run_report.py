"""What a trainer announces of its measurements: those of its latest step, and a bounded curve of its evaluations."""

from __future__ import annotations

import math

import pytest

from node.trainer.view.run_report import RunReport
from protocol.reports import MAX_EVALUATIONS, MAX_REPORT_PAYLOAD_BYTES, encode_report
from tests.support.trainer_events import evaluation, step, waiting


def after(*events: object) -> RunReport:
    report = RunReport()
    for event in events:
        report.on_event(event, 0.0)  # type: ignore[arg-type]
    return report


def test_nothing_is_reported_before_the_first_step() -> None:
    assert after(evaluation(0, 8.0), waiting()).latest is None


def test_the_latest_step_and_all_evaluations_are_reported_layer_by_layer() -> None:
    said = after(evaluation(0, 8.0), step(1), step(2, calls_failed=3), evaluation(2, 7.5), step(3)).latest
    assert said is not None
    assert (said.step, said.run_tokens, said.tokens_per_s, said.staleness) == (3, 3 * 4096, 5123.2, 1.25)
    assert (said.calls_ok, said.calls_failed, said.wire_bytes) == (96, 0, 25_200_000)
    assert (said.load_entropy_bits, said.load_cv, said.dead_experts) == ((8.0, 8.62), (0.25, 0.61), (2, 10))
    assert (said.evaluated_tokens, said.held_out_bits_per_byte) == ((0, 2 * 4096), (8.0, 7.5))


def test_an_evaluation_at_the_same_tokens_takes_the_place_of_the_one_before() -> None:
    said = after(evaluation(0, 8.0), evaluation(2, 7.5), evaluation(2, 7.25), step(3)).latest
    assert said is not None
    assert (said.evaluated_tokens, said.held_out_bits_per_byte) == ((0, 8192), (8.0, 7.25))


def test_an_evaluation_at_fewer_tokens_than_before_begins_again_from_there() -> None:
    said = after(*(evaluation(number, 8.0) for number in (0, 2, 4, 6)), evaluation(3, 7.0), step(7)).latest
    assert said is not None
    assert said.evaluated_tokens == (0, 2 * 4096, 3 * 4096)


@pytest.mark.parametrize("n", [63, 64, 65, 66, 127, 128, 129, 1000, 3001])
def test_of_many_evaluations_some_are_reported_evenly_from_the_first_to_the_latest(n: int) -> None:
    said = after(*(evaluation(number, 8.0 - number / n) for number in range(n)), step(n)).latest
    assert said is not None
    assert min(n, MAX_EVALUATIONS // 2) <= len(said.evaluated_tokens) <= MAX_EVALUATIONS
    *evenly, latest = said.evaluated_tokens
    assert latest == (n - 1) * 4096
    assert evenly == list(range(0, evenly[-1] + 1, evenly[1]))
    assert latest - evenly[-1] <= evenly[1]
    assert said.held_out_bits_per_byte == tuple(8.0 - tokens / 4096 / n for tokens in said.evaluated_tokens)
    assert len(encode_report(said)) <= MAX_REPORT_PAYLOAD_BYTES


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e12])
def test_a_step_that_no_report_can_hold_leaves_the_one_before(loss: float) -> None:
    report = after(evaluation(0, 8.0), step(1))
    before = report.latest
    report.on_event(evaluation(2, loss), 0.0)
    report.on_event(step(2, bits_per_byte=loss), 0.0)
    assert report.latest is before
    report.on_event(step(3), 0.0)
    assert report.latest is not None
    assert (report.latest.step, report.latest.evaluated_tokens) == (3, (0,))

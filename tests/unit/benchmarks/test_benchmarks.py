"""The pure parts of tests/benchmarks: what a row says, who runs when, what is compared with whom."""

from __future__ import annotations

import io
import json
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from tests.benchmarks import (
    codec,
    contenders,
    delayed_gradients,
    density,
    dispatch,
    generation,
    joining,
    latency,
    latency_grid,
    latency_plot,
    receipts,
    report,
    scaling,
    security,
    step,
    wire,
    wire_loss,
)
from tests.benchmarks.contenders import LAYER, Case, Metered, shares
from tests.benchmarks.line_peer import NoAnswerError
from tests.benchmarks.swarm_training import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

SMALL, WIDE, MEDIUM, LARGE, LARGE_INT8 = dispatch.CASES


def test_a_row_compares_medians_not_means() -> None:
    row = report.compare("case", "tokens/s", [1.0, 100.0, 10.0], "hivemind", [2.0, 2.0, 90.0])
    assert (row.ours, row.theirs, row.ratio, row.runs) == (10.0, 2.0, 5.0, 3)
    assert row.ours_runs == (1.0, 100.0, 10.0)


def test_the_document_has_the_shape_that_the_docs_quote() -> None:
    rows = [
        report.compare("case", "tokens/s", [3.0], "LocalMoE", [2.0]),
        report.not_compared("c", "m", [1.0], "x", "y"),
    ]
    content = json.loads(json.dumps(report.document("dispatch", rows, ["quiet machine"])))
    assert set(content) == {"benchmark", "commit", "machine", "rows"}
    assert content["machine"]["notes"] == ["quiet machine"]
    assert content["machine"]["torch"]
    for row in content["rows"]:
        assert row.keys() >= {"case", "metric", "ours", "against", "theirs", "ratio", "runs"}
    assert content["rows"][0]["ratio"] == 1.5
    assert content["rows"][1]["theirs"] is None
    assert content["rows"][1]["note"] == "y"


def test_the_table_shows_every_row_and_its_note() -> None:
    rows = [
        report.compare("case-1", "tokens/s", [12345.0], "LocalMoE", [2.0]),
        report.not_compared("c", "m", [1], "x", "why"),
    ]
    console = Console(file=io.StringIO(), width=160)
    console.print(report.table(report.document("dispatch", rows, [])))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for text in ("case-1", "12,340", "6,172", "why"):
        assert text in shown


def test_contenders_take_turns_after_one_warm_up_each() -> None:
    assert report.schedule(["ours", "local", "theirs"], 2) == [
        ("ours", 0),
        ("local", 0),
        ("theirs", 0),
        ("ours", 1),
        ("local", 1),
        ("theirs", 1),
        ("ours", 2),
        ("local", 2),
        ("theirs", 2),
    ]


def test_the_warm_up_is_run_and_not_counted() -> None:
    order: list[str] = []

    def contender(name: str) -> float:
        order.append(name)
        return float(order.count(name))

    told: list[str] = []
    figures = report.alternate({name: partial(contender, name) for name in "ab"}, 3, told.append)
    assert order == ["a", "b"] * 4
    assert figures == {"a": [2.0, 3.0, 4.0], "b": [2.0, 3.0, 4.0]}
    assert told[0].startswith("warm-up: a")
    assert told[2].startswith("round 1 of 3: a")


@pytest.mark.parametrize(("runs", "more"), [(report.MIN_RUNS, []), (1, ["only 1 runs: not for the docs"])])
def test_rows_of_too_few_runs_say_so(tmp_path: Path, runs: int, more: list[str]) -> None:
    rows = [report.compare("case", "tokens/s", [2.0], "theirs", [1.0])]
    report.RunsConfig(json=tmp_path / "new" / "rows.json", runs=runs).publish("wire", rows, ["a note"])
    written = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert (written["benchmark"], written["machine"]["notes"]) == ("wire", ["a note", *more])


def test_a_peer_that_takes_too_long_for_one_step_is_told_as_slower_than_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(case: Case, log: Path) -> AbstractContextManager[Callable[[], float]]:
        def run() -> float:
            raise NoAnswerError("not in time")

        return nullcontext(run)

    monkeypatch.setattr(contenders, "theirs", never)
    assert WIDE.peer_limit_s is not None
    figure, note = contenders.one_step_of_theirs(WIDE, tmp_path / "log")
    assert figure == WIDE.tokens / WIDE.peer_limit_s
    assert "slower than this" in note
    monkeypatch.setattr(contenders, "theirs", lambda case, log: nullcontext(lambda: 20.0))
    assert contenders.one_step_of_theirs(WIDE, tmp_path / "log") == (20.0, "one step, its first")


def test_a_run_is_metered_in_processor_time_per_token() -> None:
    def spin() -> float:
        until_s = time.process_time() + 0.2
        while time.process_time() < until_s:
            pass
        return 7.0

    run = Metered(spin, replace(SMALL, steps=1, tokens=1000))
    assert [run(), run()] == [7.0, 7.0]
    assert all(150 < cpu_us < 2000 for cpu_us in run.cpu_us)
    assert len(run.cpu_us) == 2


def test_wire_and_scaling_are_measured_as_the_issue_says() -> None:
    case = wire.CASE
    assert (case.d_model, case.experts_per_token, wire.HOSTS, wire.LIMIT_BYTES) == (512, 8, 2, 5300)
    rows = wire.rows_of({"int8": [2650.0], "bf16": [5300.0], "fp32": [10600.0]})
    assert [(row.against, row.ratio) for row in rows] == [("limit", 0.5), ("bf16", 0.5), ("fp32", 0.25)]
    few, many = scaling.cases_of(4096)
    assert (few.experts, many.experts, few.d_model, few.hidden, few.gate) == (1024, 65_536, 64, 8, "product_key")
    assert replace(many, key=few.key, experts=1024, experts_per_block=few.experts_per_block) == few
    cases = [(where, case) for where in (scaling.SWARM, scaling.LOCAL) for case in (few, many)]
    rates = {scaling.name_of(where, case): [1e6 / case.experts] for where, case in cases}
    assert [row.ratio for row in scaling.rows_of(4096, rates, rates)] == pytest.approx([64.0, 1 / 64] * 2, rel=1e-3)
    met = scaling.touched(256)
    assert met.theirs is not None
    assert met.theirs < met.ours <= 256 * scaling.K


def test_int8_is_compared_with_fp32_after_the_same_tokens_of_every_seed() -> None:
    (row,) = wire_loss.rows_of({"int8": [2.0, 3.0, 4.0], "fp32": [2.0, 2.5, 9.0]}, 1000)
    assert (row.ours, row.theirs, row.ratio) == (3.0, 2.5, 1.2)
    int8, fp32 = (wire_loss.plan_of(codec, 7, 8192) for codec in wire_loss.CODECS)
    assert (
        (int8.n_steps, int8.steps, int8.manifest.seed)
        == (fp32.n_steps, fp32.steps, fp32.manifest.seed)
        == (
            4,
            wire_loss.STEPS,
            7,
        )
    )
    assert replace(int8.manifest, codec="fp32") == fp32.manifest


def test_whole_steps_are_compared_with_one_process_and_many_experts_with_few() -> None:
    names = list(step.manifests())
    figures = {step.name_of(where, name): [100.0] for where in (step.SWARM, step.LOCAL) for name in names}
    figures[step.name_of(step.SWARM, names[2])] = [50.0]
    rows = step.rows_of(figures)
    assert [(row.metric, row.ratio) for row in rows] == [
        ("tokens/s", 1.0),
        ("tokens/s", 1.0),
        ("tokens/s", 0.5),
        ("seconds per step", 2.0),
        ("seconds per step", 1.0),
    ]
    row = step.touched_row({names[1]: 100, names[2]: 150})
    assert (row.case, row.metric, row.ratio) == (names[2], "touched in a step", 1.5)
    few, many = (step.manifests()[name].model for name in names[1:])
    assert (few.experts_per_layer, many.experts_per_layer) == (1024, 65_536)
    assert replace(many, experts_per_layer=1024, experts_per_block=few.experts_per_block) == few


def test_a_joiner_and_a_secured_call_are_compared_with_their_limits() -> None:
    (row,) = joining.rows_of([3.0, 4.0, 5.0])
    assert (row.ours, row.theirs, row.ratio) == (4.0, joining.LIMIT_S, 4.0 / joining.LIMIT_S)
    names = [security.name_of(kind, size) for kind in (security.SECURE, security.PLAIN) for size in security.SIZES]
    rows = security.rows_of(dict(zip(names, [[3.0], [6.0], [1.0], [2.0]], strict=True)))
    assert [(row.case, row.ratio) for row in rows] == [("64 bytes", 3.0), ("1 MB", 3.0)]


def test_the_grid_is_compared_with_no_delay_and_drawn(tmp_path: Path) -> None:
    cells = [
        latency_grid.Cell(task, experts, *fault)
        for task in ("digits", "text")
        for experts in (64, 4096)
        for fault in latency_grid.FAULTS
    ]
    losses = {cell: [2.0 if cell.delay_ms else 1.0] for cell in cells}
    grid = latency_grid.rows_of(losses)
    assert {row.ratio for row in grid} == {2.0}
    assert len(grid) == 4 * (len(latency_grid.FAULTS) - 1)
    outcome = Outcome(100.0, 2.0, 0, 4)
    speeds = latency.rows_of({(0, 0.0): outcome, (10, 0.0): outcome, (1000, 0.1): outcome}, 0)
    for name, rows in (("latency", speeds), ("latency_grid", grid)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report.document(name, rows, [])))
    latency_plot.main(latency_plot.Plot(rows=tmp_path, out=tmp_path))
    drawn = (tmp_path / "latency_grid.svg").read_text()
    assert "<svg" in drawn
    assert "<svg" in (tmp_path / "latency.svg").read_text()
    latency_plot.main(latency_plot.Plot(rows=tmp_path, out=tmp_path))
    assert (tmp_path / "latency_grid.svg").read_text() == drawn


def test_latency_compares_every_run_with_the_one_without_delay_and_failures() -> None:
    fast, slow = Outcome(100.0, 2.0, 0, 4), Outcome(50.0, 2.5, 7, 128)
    rows = latency.rows_of({(0, 0.0): fast, (1000, 0.0): slow, (0, 0.1): fast, (1000, 0.1): slow}, 0)
    assert [(row.case, row.ratio) for row in rows] == [
        ("mean delay 1000 ms", 0.5),
        ("mean delay 0 ms, 10% of calls fail", 1.0),
        ("mean delay 1000 ms, 10% of calls fail", 0.5),
        ("mean delay 1000 ms", 1.25),
        ("mean delay 0 ms, 10% of calls fail", 1.0),
        ("mean delay 1000 ms, 10% of calls fail", 1.25),
    ]
    assert {row.against for row in rows} == {"mean delay 0 ms"}


def test_delays_are_compared_with_none_at_the_same_rate_and_rates_with_the_manifests() -> None:
    losses = {(delay, rate): 2.0 + delay + rate for delay in delayed_gradients.DELAYS for rate in (1.0, 0.3)}
    rows = delayed_gradients.rows_of(losses)
    assert [(row.case, row.against) for row in rows] == [
        ("delay of 1 step, trunk's rate x 1", "delay of 0 steps, trunk's rate x 1"),
        ("delay of 3 steps, trunk's rate x 1", "delay of 0 steps, trunk's rate x 1"),
        ("delay of 1 step, trunk's rate x 0.3", "delay of 0 steps, trunk's rate x 0.3"),
        ("delay of 3 steps, trunk's rate x 0.3", "delay of 0 steps, trunk's rate x 0.3"),
        ("delay of 0 steps, trunk's rate x 0.3", "delay of 0 steps, trunk's rate x 1"),
    ]
    assert rows[0].ratio == pytest.approx(4 / 3, rel=1e-3)


def test_a_codec_is_compared_with_a_copy_and_with_hivemind() -> None:
    run = codec.ours("int8", torch.randn(codec.SHAPE))
    assert run() > 0
    figures = {name: [2.0] for name in (codec.COPY, *map(codec.peer_of, codec.PEERS))}
    figures |= {codec.name_of(kind): [1.0] for kind in codec.PEERS}
    assert [row.ratio for row in codec.rows_of(figures)] == [0.5] * 6


@pytest.mark.parametrize("n_blocks", [2, 8, 32])
@pytest.mark.parametrize("hosts", [1, 2])
def test_hosts_share_every_block_once(n_blocks: int, hosts: int) -> None:
    ranges = [share.removeprefix(f"{LAYER}/").split("-") for share in shares(n_blocks, hosts)]
    blocks = [block for start, stop in ranges for block in range(int(start), int(stop) + 1)]
    assert blocks == list(range(n_blocks))
    assert len(ranges) == hosts


def test_the_line_of_the_issue_is_measured_against_hivemind() -> None:
    assert (SMALL.experts, SMALL.d_model, SMALL.hidden, SMALL.experts_per_token, SMALL.tokens) == (64, 64, 256, 4, 256)
    assert dispatch.hivemind_can(SMALL)
    figures = {dispatch.OURS: [60.0], dispatch.LOCAL: [120.0], dispatch.HIVEMIND: [1.0]}
    rows = dispatch.rows_of(SMALL, SMALL.name(1), figures)
    assert [(row.against, row.ratio, row.note) for row in rows] == [
        (dispatch.LOCAL, 0.5, ""),
        (dispatch.HIVEMIND, 60.0, ""),
    ]


@pytest.mark.parametrize("case", [MEDIUM, LARGE], ids=lambda case: case.key)
def test_where_hivemind_was_not_run_the_row_says_so_and_holds_no_figure(case: Case) -> None:
    rows = dispatch.rows_of(case, case.name(2), {dispatch.OURS: [2.0], dispatch.LOCAL: [1.0]})
    assert [(row.against, row.theirs, row.ratio) for row in rows] == [
        (dispatch.LOCAL, 1.0, 2.0),
        (dispatch.HIVEMIND, None, None),
    ]
    assert rows[1].note == dispatch.HIVEMIND_NOT_RUN


def test_unknown_cases_are_named_with_those_that_are_known() -> None:
    assert dispatch.chosen_cases("large,small") == [LARGE, SMALL]
    with pytest.raises(SystemExit, match=r"tiny.*small, wide, medium, large"):
        dispatch.chosen_cases("small,tiny")


def test_memory_limits_are_those_of_the_issues() -> None:
    bytes_of = {case.experts: limits.memory_bytes(case.manifest().model) for case, limits in density.CASES.items()}
    assert bytes_of == {
        1024: 1.25 * (1024 * 2 * 128 * 64 * 4 * 3) + 450e6,
        16_384: pytest.approx(1.15 * (16_384 * 2 * 128 * 64 * 4 * 3) + 450e6),
    }


def test_density_rows_hold_the_limits() -> None:
    memory = density.Memory(pss=int(500e6), rss=int(600e6))
    start = density.Start(seconds=5.0, host_seconds=1.0, rest=memory, trained=memory, processes=2)
    rows = {row.metric: row for row in density.rows_of(density.FEW, density.CASES[density.FEW], [start] * 5)}
    assert (rows["announced, seconds"].ratio, rows["announced, seconds"].runs) == (0.5, 5)
    assert rows["at rest, PSS MB"].ours == 500.0
    assert rows["at rest, PSS MB"].theirs == pytest.approx(701.7)
    assert all(row.against == "limit" for row in rows.values())


def test_what_an_expert_takes_is_compared_with_hivemind() -> None:
    memory = density.Memory(pss=int(512e6), rss=int(600e6))
    start = density.Start(seconds=5.0, host_seconds=1.0, rest=memory, trained=memory, processes=2)
    rows = density.per_expert(density.FEW, [start], density.PerExpert(pss_mb=20.0, processes=2.0))
    assert [(row.ours, row.theirs) for row in rows] == [(0.5, 20.0), (0.001953, 2.0)]


def test_a_process_tree_has_memory() -> None:
    memory = density.tree_memory(os.getpid())
    assert 0 < memory.pss <= memory.rss


def test_both_ways_to_generate_write_the_same() -> None:
    model, firsts = generation.new_model(context=6), generation.prompts(3)
    ours, theirs = (write(model, firsts, 10) for write in (generation.with_cache, generation.without_cache))
    assert ours == theirs
    assert [len(of_stream) for of_stream in ours] == [10] * 3


@pytest.mark.parametrize("add_up", [receipts.in_ledger, receipts.in_plain_table], ids=["a ledger", "a plain table"])
def test_receipts_add_up_to_the_same_in_both_ways(
    tmp_path: Path, add_up: Callable[[Path, int, Callable[[], None]], int]
) -> None:
    looks: list[int] = []
    n_receipts = 6 * receipts.N_HOSTS
    assert add_up(tmp_path, n_receipts, lambda: looks.append(1)) == 1000 * n_receipts
    assert len(looks) == receipts.N_HOSTS


def test_receipts_that_add_up_to_something_else_are_no_figure() -> None:
    with pytest.raises(SystemExit, match="the receipts add up to 7 backward pairs, not to 100000"):
        receipts.timed(receipts.N_HOSTS, lambda folder, n, look: 7, [])()


def test_every_row_of_receipts_has_its_figure() -> None:
    figures = {name: [2.0] for name in (receipts.OURS, receipts.PLAIN, receipts.CHECKED, receipts.SIGNATURES)}
    speed, memory, checked = receipts.rows_of(figures, [99.0, 5.0], 1000)
    assert (speed.ours, speed.theirs, memory.ours, memory.theirs, checked.ratio) == (2.0, 2.0, 5.0, None, 1.0)

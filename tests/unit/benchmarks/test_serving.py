"""What the benchmark of serving says of rounds of streams: which count, what is compared, and with which targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.benchmarks import serving
from tests.benchmarks.report import alternate
from tests.benchmarks.streams import FIRST, RATE, Contender, Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def contender(rates: Sequence[float], meters: dict[str, Callable[[], float]] | None = None) -> Contender:
    """Rounds of 100 tokens with these rates, whose first token comes after a tenth of a second."""
    timings = (Timing(first_s=0.1, rate=rate) for rate in rates)
    return Contender(lambda: next(timings), n_tokens=100, meters=meters)


def clock(step_s: float) -> Callable[[], float]:
    """A meter that has moved on by `step_s` at every look."""
    looks = iter(range(1000))
    return lambda: step_s * next(looks)


def test_the_warm_up_counts_in_no_figure_and_meters_are_told_for_each_token() -> None:
    rounds = contender([1.0, 2.0, 3.0], {"cpu": clock(0.5)})
    assert alternate({"ours": rounds}, 2, lambda _: None) == {"ours": [2.0, 3.0]}
    assert rounds.figures(RATE) == [2.0, 3.0]
    assert rounds.figures(FIRST) == [100.0, 100.0]
    assert rounds.figures("cpu") == pytest.approx([5.0, 5.0])


def test_what_is_served_is_compared_with_the_library_beside_the_target() -> None:
    ours = contender([9.0, 5.0], {serving.CPU: clock(1.0), serving.HOSTS_CPU: clock(0.25)})
    theirs = contender([9.0, 10.0], {serving.CPU: clock(0.5)})
    alternate({serving.OURS: ours, serving.LIBRARY: theirs}, 1, lambda _: None)
    rows = serving.library_rows("case", {serving.OURS: ours, serving.LIBRARY: theirs}, 0.5)
    assert [(row.metric, row.ours, row.theirs, row.ratio) for row in rows] == [
        (RATE, 5.0, 10.0, 0.5),
        (FIRST, 100.0, 100.0, 1.0),
        (serving.CPU, 10.0, 5.0, 2.0),
        (serving.HOSTS_CPU, 2.5, None, None),
    ]
    assert [row.note for row in rows] == ["target of the ratio: 0.5", "", "", ""]


def test_cases_are_chosen_by_name_in_their_order_and_unknown_ones_are_named_with_those_that_are_known() -> None:
    assert serving.chosen_cases("process,generate") == ["generate", "process"]
    with pytest.raises(SystemExit, match=r"whole.*generate, uncached, process"):
        serving.chosen_cases("process,whole")

"""What looks at the run again and again, and what it does with what it sees."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from common.web.feed import Feed
from coordinator.dashboard.history import COLUMNS
from coordinator.dashboard.watch import SAMPLE_S, RunWatch, evaluations_of, sample_of
from tests.support.dashboard import ViewedDirectory
from tests.support.run_views import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

SOON_S = 20.0


class Samples:
    """A history that keeps what it is given."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, Mapping[str, float | None], Sequence[tuple[int, float]]]] = []

    def add(self, t_s: float, sample: Mapping[str, float | None], evaluations: Sequence[tuple[int, float]]) -> None:
        self.taken.append((t_s, sample, evaluations))


def watch() -> tuple[RunWatch, ViewedDirectory, Samples, Feed]:
    directory, samples, feed = ViewedDirectory(), Samples(), Feed(4)
    return RunWatch(directory, MANIFEST, feed, samples), directory, samples, feed


async def test_a_look_is_told_to_every_page() -> None:
    looking, *_, feed = watch()
    with feed.joined() as client:
        await looking.look()
        told = await client.news(SOON_S)
    assert told == looking.overview
    assert json.loads(told or b"")["figures"]["held_out_bits_per_byte"] == 4.0
    assert looking.snapshot.figures.peers["host"] == 6


async def test_a_sample_is_kept_as_often_as_the_finest_rows_are() -> None:
    looking, directory, samples, _ = watch()
    for _ in range(2 * SAMPLE_S):
        await looking.look()
        directory.later(1)
    assert [t_s for t_s, *_ in samples.taken] == [1000.0, 1000.0 + SAMPLE_S]
    directory.later(-1000)  # the clock was set back
    await looking.look()
    assert len(samples.taken) == 3


async def test_a_sample_has_every_figure_and_all_evaluations() -> None:
    looking, directory, samples, _ = watch()
    await looking.look()
    ((_, sample, evaluations),) = samples.taken
    assert sample.keys() == set(COLUMNS)
    assert (sample["hosts"], sample["trainers"], sample["held_out_bits_per_byte"]) == (6, 3, 4.0)
    assert sample == sample_of(looking.snapshot.figures)
    assert list(evaluations) == evaluations_of(directory.view) == [(0, 8.0), (20_480, 4.0)]


async def test_while_the_dht_is_away_pages_are_told_and_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    looking, directory, samples, feed = watch()
    directory.problem = "dht: no answer"
    with feed.joined() as client:
        for _ in range(3):
            await looking.look()
            directory.later(60)
        assert json.loads(await client.news(SOON_S) or b"")["problem"] == looking.problem == "dht: no answer"
    assert samples.taken == []
    assert caplog.text.count("the page is not up to date: dht: no answer") == 1
    directory.problem = ""
    await looking.look()
    assert not looking.problem
    assert len(samples.taken) == 1

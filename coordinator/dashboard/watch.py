"""Looks at the run again and again: a view of it becomes a snapshot, the feed's news and a sample of history."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from common.errors import KilohiveError
from common.tasks import Periodic
from coordinator.dashboard import answers
from coordinator.dashboard.history import COLUMNS, TIERS
from coordinator.dashboard.snapshot import Snapshot, take_snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from common.web.feed import Feed
    from coordinator.figures import RunFigures
    from dht.view import DirectoryView
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

SAMPLE_S = TIERS[0].step_s
ROLE_COLUMNS = {"host": "hosts", "trainer": "trainers", "coordinator": "coordinators", "lighthouse": "lighthouses"}


class Looks(Protocol):
    """The part of a directory that a watch needs."""

    async def refresh_now(self) -> None:
        """Look all keys up. Raises UnavailableError: what was known stays until it expires."""

    def snapshot(self, *, with_avoided: bool = False) -> DirectoryView:
        """What is live now."""


class KeepsSamples(Protocol):
    """The part of a history that a watch needs."""

    def add(self, t_s: float, sample: Mapping[str, float | None], evaluations: Sequence[tuple[int, float]]) -> None:
        """Have a sample written."""


class RunWatch:
    """What is shown now. `problem`: why the latest look at the DHT failed, if it did. Belongs to the event loop."""

    def __init__(self, directory: Looks, manifest: Manifest, feed: Feed, history: KeepsSamples) -> None:
        self._directory, self._manifest, self._feed, self._history = directory, manifest, feed, history
        self._sampled_s = float("-inf")
        self.problem = ""
        self.snapshot: Snapshot = take_snapshot(manifest, directory.snapshot())
        self.overview = b""

    def every(self, period_s: float) -> Periodic:
        """Return what looks every `period_s` seconds, to be started and stopped."""
        return Periodic("run watch", period_s, self.look)

    async def look(self) -> None:
        """Look once, and tell every page."""
        problem = await self._refreshed()
        if problem and not self.problem:  # once, not at every look
            logger.warning("the page is not up to date: %s", problem)
        self.problem = problem
        view = self._directory.snapshot(with_avoided=True)
        self.snapshot, self.overview = await asyncio.to_thread(self._gathered, view)
        self._feed.publish(self.overview)
        if not problem:
            self._sample(view)

    async def _refreshed(self) -> str:
        """Why not, or nothing."""
        try:
            await self._directory.refresh_now()
        except KilohiveError as error:
            return str(error)
        return ""

    def _gathered(self, view: DirectoryView) -> tuple[Snapshot, bytes]:
        snapshot = take_snapshot(self._manifest, view)
        return snapshot, answers.encoded(answers.overview(snapshot, self.problem))

    def _sample(self, view: DirectoryView) -> None:
        """Keep what was seen, as often as the finest rows of the history are."""
        if view.taken_s - self._sampled_s >= SAMPLE_S or view.taken_s < self._sampled_s:
            self._sampled_s = view.taken_s
            self._history.add(view.taken_s, sample_of(self.snapshot.figures), evaluations_of(view))


def sample_of(figures: RunFigures) -> dict[str, float | None]:
    """A row of the history."""
    by_role = {column: figures.peers[role] for role, column in ROLE_COLUMNS.items()}
    return {name: by_role[name] if name in by_role else getattr(figures, name) for name in COLUMNS}


def evaluations_of(view: DirectoryView) -> list[tuple[int, float]]:
    """Return what trainers have found on held-out text, as tokens of the run and bits per byte."""
    said = [reported.said for reported in view.reports]
    return [
        pair for report in said for pair in zip(report.evaluated_tokens, report.held_out_bits_per_byte, strict=True)
    ]

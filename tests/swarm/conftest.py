"""What tests of hosts share: a coordinator for all of a module, whose hosts and trainers are each test's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from experiments.live.processes import process_swarm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from experiments.live.processes import ProcessSwarm

LEAVE_S = 20.0


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessSwarm]:
    """A swarm of the module's MANIFEST."""
    with process_swarm(tmp_path_factory.mktemp("running") / "swarm", request.module.MANIFEST) as running:
        yield running


@pytest.fixture
def swarm(running: ProcessSwarm) -> Iterator[ProcessSwarm]:
    """The coordinator of all these tests, and nobody else: each test's hosts and trainers leave with it."""
    yield running
    for node in [node for node in reversed(running.nodes) if node is not running.coordinator]:
        assert node.stop(LEAVE_S) in {0, 130}, node.child.log_tail()
        running.nodes.remove(node)

"""What tests of faults share: a swarm of processes of the module's MANIFEST, and a text that a small model learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from experiments.live.processes import ProcessSwarm, process_swarm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def swarm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ProcessSwarm]:
    with process_swarm(tmp_path, request.module.MANIFEST) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join(f"Sentence {n} says that {n} plus {n} is {n + n}." for n in range(3000)))
    return path

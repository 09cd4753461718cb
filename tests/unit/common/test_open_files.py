"""How many files a node may have open."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest

import run_node
from common.open_files import ENOUGH, raise_open_files_limit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FEW = 512


@pytest.fixture
def few_files() -> Iterator[int]:
    """A soft limit as low as some systems have it; gives the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_command_may_open_as_many_files_as_its_hard_limit_allows(few_files: int, tmp_path: Path) -> None:
    assert run_node.main(["health", "--state", str(tmp_path)]) != 0
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (few_files, few_files)


class System:
    """Limits of files that a test sets; `granted` is the most that may be set, as on macOS."""

    def __init__(self, soft: int, hard: int, granted: int) -> None:
        self.soft, self.hard, self._granted = soft, hard, granted

    def getrlimit(self, _: int) -> tuple[int, int]:
        return self.soft, self.hard

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        if limits[0] == resource.RLIM_INFINITY or limits[0] > self._granted:
            raise ValueError("not allowed to raise maximum limit")
        self.soft = limits[0]


@pytest.mark.parametrize(
    ("system", "soft", "told"),
    [
        (System(256, 1 << 20, 1 << 20), 1 << 20, False),
        (System(256, resource.RLIM_INFINITY, 10_240), ENOUGH, False),
        (System(resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1), resource.RLIM_INFINITY, False),
        (System(256, 1024, 1024), 1024, True),
        (System(64, 64, 64), 64, True),
    ],
    ids=["raised", "hard limit that is not granted", "no limit", "hard limit too low", "nothing to raise"],
)
def test_the_limit_is_raised_as_far_as_it_goes_and_told_if_that_is_little(
    system: System, soft: int, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    assert raise_open_files_limit() == system.soft == soft
    assert bool(caplog.messages) is told
    assert not told or caplog.messages[0].startswith(f"Only {soft} files and connections may be open at once")

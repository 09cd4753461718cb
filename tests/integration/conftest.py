"""What several files here start: DHT nodes, lighthouses."""

from __future__ import annotations

from multiprocessing.resource_tracker import ensure_running
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.support.dht_nodes import Start, running_nodes
from tests.support.lighthouse import Light, running_lighthouses

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def _resource_tracker() -> None:
    """A process of multiprocessing's that begins with the first one that is spawned, and ends with this one."""
    ensure_running()


@pytest_asyncio.fixture
async def start() -> AsyncIterator[Start]:
    async with running_nodes() as start_one:
        yield start_one


@pytest.fixture
def light(tmp_path: Path) -> Iterator[Light]:
    with running_lighthouses(tmp_path) as start_one:
        yield start_one

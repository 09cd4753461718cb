"""Credit on a coordinator: it looks who is in the run, and collects receipts from time to time, beside all else."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from common.errors import KilohiveError
from common.seldom import Seldom
from common.tasks import Periodic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from coordinator.credit.collection import Collection
    from coordinator.credit.collector import Collected

logger = logging.getLogger(__name__)

LOOK_S = 30.0
"""How often a coordinator notes who is there, and what trainers announce: who leaves between two collections counts."""


@asynccontextmanager
async def collecting(collection: Collection, period_s: float, tell: Callable[[Collected], None]) -> AsyncIterator[None]:
    """Look every LOOK_S seconds and collect every `period_s`, while the context lasts; `tell` hears what came of it.

    What fails is told once a minute at most, and tried again.
    """
    told = Seldom()

    async def or_warn(work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except KilohiveError as error:
            if told.due("credit"):
                logger.warning("Receipts are not collected now: %s", error)

    async def collect() -> None:
        tell(await collection.collect())

    looking = Periodic("look at members", LOOK_S, lambda: or_warn(collection.look))
    gathering = Periodic("collect receipts", period_s, lambda: or_warn(collect))
    looking.start()
    gathering.start()
    try:
        yield
    finally:
        await looking.stop()
        await gathering.stop()

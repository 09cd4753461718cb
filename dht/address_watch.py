"""Notices that this machine no longer has the address that a node listens at: after sleep, DHCP, or another Wi-Fi."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from common.errors import ConfigError, UnavailableError
from dht.addresses import AUTO, is_own, listen_host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

logger = logging.getLogger(__name__)

LOOK_S = 5.0
LOOKS = 2
"""A lease that is renewed, or an address of IPv6 that is being checked, is away for a moment."""

GIVEN_UP_S = 30.0
"""How long a node waits for an address that it was told to listen at."""

LOOKUP_TIMEOUT_S = 10.0


class AddressWatch:
    """One node's: `listen` is what it was told, `host` the address that it took, `peers` those that it must reach."""

    def __init__(self, listen: str, host: str, peers: Sequence[str], look_s: float = LOOK_S) -> None:
        self._given, self._host, self._peers, self._look_s = listen != AUTO, host, peers, look_s
        self._missing = 0
        self.moved_to = ""
        self._lost = ""

    def raise_if_lost(self) -> None:
        """Raise UnavailableError if the address that was given is gone, so that whoever started this node acts."""
        if self._lost:
            raise UnavailableError(self._lost)

    @asynccontextmanager
    async def stopping(self, stop: asyncio.Event) -> AsyncIterator[asyncio.Event]:
        """Yield what is set when `stop` is, or when this node cannot go on at its address."""
        ended = asyncio.Event()
        tasks = [asyncio.create_task(self._watch(), name="address"), asyncio.create_task(stop.wait(), name="stop")]
        for task in tasks:
            task.add_done_callback(lambda _: ended.set())
        try:
            yield ended
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):  # a mistake in the watch must not end a node as if it had been asked
                    raise result

    async def _watch(self) -> None:
        while not (self.moved_to or self._lost):
            await asyncio.sleep(self._look_s)
            await self._look()

    async def _look(self) -> None:
        if is_own(self._host):
            if self._missing:
                logger.info("This machine has the address %s again", self._host)
            self._missing = 0
            return
        self._missing += 1
        if self._given:
            self._wait_for_it()
        elif self._missing >= LOOKS:
            await self._find_another()

    def _wait_for_it(self) -> None:
        gone = f"This machine no longer has the address {self._host}, which --listen names"
        if self._missing == 1:
            logger.warning("%s; this node ends if it is not back within %g s", gone, GIVEN_UP_S)
        if self._missing * self._look_s >= GIVEN_UP_S:
            self._lost = f"{gone}, so nobody can call this node; give it another, or --listen auto, which follows"

    async def _find_another(self) -> None:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                found = await asyncio.to_thread(listen_host, AUTO, self._peers)
        except (ConfigError, TimeoutError):
            if self._missing == LOOKS:
                logger.warning("This machine no longer has the address %s, nor a way to the swarm; waiting", self._host)
            return
        logger.warning("This machine's address was %s and is %s now: this node moves there", self._host, found)
        self.moved_to = found

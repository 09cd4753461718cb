"""Carries a circuit's bytes both ways, within what its quotas allow: libp2p's circuits and those of nodes alike."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

import trio

from common.errors import UnavailableError
from dht.framing import PIECE_BYTES

if TYPE_CHECKING:
    from coordinator.lighthouse.streams import TrioStream
    from dht.relay.quotas import Circuit, RelayQuotas

logger = logging.getLogger(__name__)

STALL_TIMEOUT_S = 60.0
"""How long the side that is written to may take to make room for one piece."""

ROOM_POLL_S = 0.002


class Account(NamedTuple):
    """A circuit, and the quotas that it counts against; it ends when nothing moves for `idle_s`."""

    quotas: RelayQuotas[bytes]
    circuit: Circuit[bytes]
    idle_s: float = math.inf


async def carry(source: TrioStream, target: TrioStream, account: Account) -> bool:
    """Carry bytes until both ends have ended, one fails, or a limit is reached; returns whether both ended."""
    with trio.move_on_after(account.quotas.limits.circuit_s), trio.move_on_after(account.idle_s) as silence:
        async with trio.open_nursery() as nursery:
            flow = _Flow(account, silence, nursery.cancel_scope)
            for one, other in ((source, target), (target, source)):
                nursery.start_soon(flow.pump, one, other)
        return not nursery.cancel_scope.cancel_called
    return False


class _Flow(NamedTuple):
    """A circuit while it is carried: `silence` ends it when its time is over, `both` at once."""

    account: Account
    silence: trio.CancelScope
    both: trio.CancelScope

    async def pump(self, source: TrioStream, target: TrioStream) -> None:
        quotas, circuit, idle_s = self.account
        try:
            while data := await source.read(PIECE_BYTES):
                if not quotas.pass_bytes(circuit, len(data)):
                    self.both.cancel()
                    return
                self.silence.deadline = trio.current_time() + idle_s
                await _wait_for_capacity(target, len(data))
                await target.write(data)
            await target.end()
        except UnavailableError as error:
            logger.debug("relay: a circuit has ended: %s", error)
            self.both.cancel()


async def _wait_for_capacity(stream: TrioStream, n_bytes: int) -> None:
    """py-libp2p gives a stream up when its other side makes no room for five seconds: a busy peer takes longer."""
    with trio.move_on_after(STALL_TIMEOUT_S):
        while stream.capacity() < n_bytes:  # noqa: ASYNC110 - libp2p tells nobody
            await trio.sleep(ROOM_POLL_S)
        return
    raise UnavailableError(f"made no room for {STALL_TIMEOUT_S:g} s")

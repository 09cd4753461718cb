"""What a lighthouse's circuits carry and when they end, with streams that are no sockets and a clock that jumps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import pytest

from dht.relay.quotas import RelayLimits, RelayQuotas
from dht.relay.relaying import IDLE_S

trio = pytest.importorskip("trio", reason="trio is not installed: make setup-lighthouse says why")
trio_testing = pytest.importorskip("trio.testing")

from coordinator.lighthouse.circuits import Account, carry  # noqa: E402 - it imports trio

if TYPE_CHECKING:
    from coordinator.lighthouse.streams import TrioStream

LIMITS = RelayLimits(max_reservations=1, max_circuits=1, circuit_bytes=100, circuit_s=3600.0)


class Side:
    """One end of a circuit: says a byte at each of `at_s`, and then nothing, or its end."""

    def __init__(self, at_s: tuple[float, ...] = (), *, ends: bool = False) -> None:
        self._at_s, self._ends = list(at_s), ends
        self.heard = b""

    async def read(self, _n_bytes: int) -> bytes:
        if not self._at_s and self._ends:
            return b""
        await trio.sleep_until(self._at_s.pop(0) if self._at_s else math.inf)
        return b"x"

    async def write(self, data: bytes) -> None:
        self.heard += data

    async def end(self) -> None:
        self.heard += b"."

    def capacity(self) -> int:
        return 100


def carried(one: Side, other: Side, idle_s: float) -> tuple[bool, float]:
    """Whether both sides have ended, and after how long it was over."""
    quotas = RelayQuotas[bytes](LIMITS, lambda: 0.0)
    quotas.reserve(b"target", "127.0.0.1")
    account = Account(quotas, quotas.open(b"source", b"target"), idle_s)

    async def run() -> tuple[bool, float]:
        return await carry(cast("TrioStream", one), cast("TrioStream", other), account), trio.current_time()

    outcome: tuple[bool, float] = trio.run(run, clock=trio_testing.MockClock(autojump_threshold=0))
    return outcome


def test_a_circuit_over_which_nothing_moves_is_closed() -> None:
    assert carried(Side(), Side(), IDLE_S) == (False, IDLE_S)


def test_a_byte_either_way_keeps_a_circuit_open() -> None:
    one, other = Side((100.0,)), Side((200.0,))
    assert carried(one, other, IDLE_S) == (False, 200.0 + IDLE_S)
    assert (one.heard, other.heard) == (b"x", b"x")


def test_peers_of_libp2p_may_be_silent_until_their_time_is_up() -> None:
    assert carried(Side(), Side(), math.inf) == (False, LIMITS.circuit_s)


def test_a_circuit_is_whole_when_both_sides_have_ended() -> None:
    one, other = Side((1.0,), ends=True), Side((5.0,), ends=True)
    assert carried(one, other, IDLE_S) == (True, 5.0)
    assert (one.heard, other.heard) == (b"x.", b"x.")

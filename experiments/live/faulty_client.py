"""Faults at the RPC boundary, seeded: what a network of volunteers does to a trainer's calls, on one machine.

Only experiments and tests can put this client in the place of the product's; no flag of a node does.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from common.errors import DeadlineError, UnavailableError
from node.trainer.dispatch.client import ExpertClient

if TYPE_CHECKING:
    from protocol.endpoints import Address
    from protocol.security import Caller


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What befalls a call; probabilities are each drawn for themselves.

    `delay_mean_s` of an exponential delay, half of it before the call and half after, so that the host sees the calls
    in another order than they were made; `fail` ends a call with an error, before or after the host has answered it;
    `silent` never answers; `duplicate` sends the request twice; `corrupt` flips a bit of the answer;
    `drain_bytes_per_s` is how fast an answer can be read, 0 for at once.
    """

    delay_mean_s: float = 0.0
    fail: float = 0.0
    silent: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    drain_bytes_per_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("fail", "silent", "duplicate", "corrupt"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1")
        if min(getattr(self, field.name) for field in fields(self)) < 0:
            raise ValueError("no fault can be negative")


class _Fate(NamedTuple):
    """What befalls one call."""

    delay_s: float
    fails: bool
    fails_before: bool
    silent: bool
    twice: bool
    corrupt: bool
    where: float
    """Which of the answer's bits is flipped, from 0 to 1."""

    @classmethod
    def drawn(cls, faults: Faults, rng: random.Random) -> _Fate:
        return cls(
            delay_s=rng.expovariate(1 / faults.delay_mean_s) if faults.delay_mean_s else 0.0,
            fails=rng.random() < faults.fail,
            fails_before=rng.random() < 1 / 2,
            silent=rng.random() < faults.silent,
            twice=rng.random() < faults.duplicate,
            corrupt=rng.random() < faults.corrupt,
            where=rng.random(),
        )


class FaultyClient(ExpertClient):
    """Calls hosts through `faults`; `counts` says what has befallen them."""

    def __init__(self, faults: Faults, caller: Caller) -> None:
        super().__init__(caller)
        self.faults, self.counts = faults, Counter[str]()
        self._random = random.Random(faults.seed)

    async def _send(self, address: Address, method: str, raw: bytes, timeout_s: float) -> bytes:
        # Drawn before the first wait: the n-th call meets the same, however the calls overtake each other.
        fate = _Fate.drawn(self.faults, self._random)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(fate.delay_s / 2)
                if fate.fails and fate.fails_before:
                    self._fail("before the host had it")
                calls = [self._deliver(address, method, raw, timeout_s) for _ in range(1 + fate.twice)]
                self.counts["duplicate"] += fate.twice
                answer = (await asyncio.gather(*calls))[-1]
                if fate.fails:
                    self._fail("after the host had answered")
                if fate.silent:
                    self.counts["silent"] += 1
                    await asyncio.Event().wait()
                await asyncio.sleep(fate.delay_s / 2 + self._drain_s(len(answer)))
        except TimeoutError:
            raise DeadlineError("the call took too long: an injected fault") from None
        return self._corrupted(answer, fate.where) if fate.corrupt else answer

    async def _deliver(self, address: Address, method: str, raw: bytes, timeout_s: float) -> bytes:
        return await super()._send(address, method, raw, timeout_s)

    def _fail(self, when: str) -> NoReturn:
        self.counts["fail"] += 1
        raise UnavailableError(f"an injected fault, {when}")

    def _drain_s(self, n_bytes: int) -> float:
        return n_bytes / self.faults.drain_bytes_per_s if self.faults.drain_bytes_per_s else 0.0

    def _corrupted(self, answer: bytes, where: float) -> bytes:
        self.counts["corrupt"] += 1
        changed, bit = bytearray(answer), int(where * 8 * len(answer))
        if changed:
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

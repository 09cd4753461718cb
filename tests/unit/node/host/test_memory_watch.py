"""A host's memory beside its limit: near it no call is taken, over it for long a block goes."""

from __future__ import annotations

from common.errors import OverloadedError
from node.host.memory_watch import OVER_FOR_LOOKS, MemoryWatch
from node.limits.process_usage import ProcessUse


class FakeUse(ProcessUse):
    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def memory_bytes(self) -> int:
        return self.taken


def watched(limit_bytes: int | None) -> tuple[MemoryWatch, FakeUse, list[str]]:
    use, given_up = FakeUse(), list[str]()

    async def give_up_one(reason: str) -> None:
        given_up.append(reason)

    return MemoryWatch(limit_bytes, use, give_up_one), use, given_up


async def test_near_the_limit_calls_are_refused_until_there_is_room_again() -> None:
    watch, use, given_up = watched(600_000_000)
    refused = []
    for use.taken in (500_000_000, 590_000_000, 500_000_000):
        await watch.look()
        refused.append(watch.refusal())
    assert [type(one) for one in refused] == [type(None), OverloadedError, type(None)]
    assert not given_up


async def test_only_memory_that_stays_over_the_limit_costs_a_block() -> None:
    watch, use, given_up = watched(600_000_000)
    use.taken = 700_000_000
    for _ in range(OVER_FOR_LOOKS - 1):
        await watch.look()
    use.taken = 500_000_000
    await watch.look()
    assert not given_up
    use.taken = 700_000_000
    for _ in range(OVER_FOR_LOOKS):
        await watch.look()
    assert given_up == ["it takes 700 MB of the 600 MB that it may"]


async def test_without_a_limit_memory_is_only_measured() -> None:
    watch, use, given_up = watched(None)
    use.taken = 1 << 50
    for _ in range(2 * OVER_FOR_LOOKS):
        await watch.look()
    assert (watch.used_bytes, watch.refusal(), given_up) == (1 << 50, None, [])


async def test_a_limit_that_is_set_or_taken_away_later_holds_from_the_next_look_on() -> None:
    watch, use, _ = watched(None)
    use.taken = 590_000_000
    await watch.look()
    assert watch.refusal() is None
    watch.limit_bytes = 600_000_000
    await watch.look()
    assert isinstance(watch.refusal(), OverloadedError)
    watch.limit_bytes = None
    await watch.look()
    assert watch.refusal() is None

"""Partners that fall silent in the middle of an exchange, and partners that are only slow."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from common.errors import DeadlineError, UnavailableError
from node.limits.limits import Limits
from node.limits.rate_limits import RateLimits
from node.rpc.message_stream import ALIVE, ALIVE_PER_SILENCE, Wire
from protocol.manifest import TRUNK
from tests.support.averaging_faults import kind, pair
from tests.support.averaging_parts import BLOCK, Cable, CableEnd, exchange_config, exchange_in_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protocol.manifest import AveragingCodec
    from tests.support.averaging_parts import MemoryReplica

SILENCE_S = 0.1
SLOW_SILENCE_S = 2.0
WAIT_S = 60.0
COPY, MOVE = 2, 3  # of the calls of a replica
BLOCKS = (BLOCK, TRUNK)


async def messages_of(codec: AveragingCodec) -> tuple[int, list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """Of an exchange that goes well: how many there are, the replicas before and after it."""
    nodes, cable = pair(codec, BLOCKS), Cable()
    before = nodes.raws()
    a, b = (exchange_config(name, codec=codec) for name in ("peer-a", "peer-b"))
    await exchange_in_memory((nodes.a_set, a), (nodes.b_set, b), BLOCKS, cable)
    return cable.n_messages, before, nodes.raws()


@pytest.mark.parametrize("frozen", ["dialler", "answerer"])
async def test_a_partner_frozen_at_any_message_costs_only_silence_and_leaves_each_block_whole(frozen: str) -> None:
    n_messages, before, after = await messages_of("int8")
    n_missed = 0
    for at in range(n_messages):
        nodes = pair("int8", BLOCKS)

        async def swallow(who: str, number: int, raw: bytes, at: int = at) -> Sequence[bytes]:
            return () if who == frozen and number >= at else (raw,)

        # The other limits are those of a run: the exchange would last for a long time.
        outcome = await nodes.exchange(swallow, silence_s=SILENCE_S)
        errors = [e for e in (outcome.dial_error, outcome.answer_error) if e is not None]
        # What is swallowed after a side's last message is missed by nobody.
        n_missed += bool(errors)
        assert errors or [m.block for m in outcome.dialled.moved] == list(BLOCKS)
        assert not errors or any("the partner has been silent for 0.1 s" in str(e) for e in errors)
        for (a_raw, b_raw), was, will in zip(nodes.raws(), before, after, strict=True):
            assert (a_raw, b_raw) in {was, will, (was[0], will[1])}  # only the answerer may move alone
        again = await nodes.exchange()
        assert [m.block for m in again.dialled.moved] == list(BLOCKS)
        assert again.dial_error is again.answer_error is None
    assert n_missed > 0


@pytest.mark.parametrize("sender", ["dialler", "answerer"])
@pytest.mark.parametrize("at", ["offer", "start", "piece", "settle"])
async def test_a_partner_that_takes_no_more_costs_its_sender_only_silence(sender: str, at: str) -> None:
    nodes = pair("int8")
    before = nodes.raws()[0]

    async def full(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        if who == sender and kind(raw) == at:
            await asyncio.Event().wait()
        return (raw,)

    outcome = await nodes.exchange(full, silence_s=SILENCE_S)
    errors = outcome.dial_error, outcome.answer_error
    assert any(isinstance(e, DeadlineError) and "silent" in str(e) for e in errors)
    after = nodes.raws()[0]
    assert after[0] == before[0]
    assert (after[1] != before[1]) == ((sender, at) == ("answerer", "settle"))
    assert [m.block for m in (await nodes.exchange()).dialled.moved] == [BLOCK]


@pytest.mark.parametrize("at", [COPY, MOVE])
@pytest.mark.parametrize("slow", ["dialler", "answerer"])
async def test_a_partner_whose_step_takes_longer_than_silence_says_that_it_is_alive(slow: str, at: int) -> None:
    nodes = pair()
    replica: MemoryReplica = (nodes.a if slow == "dialler" else nodes.b)[0]
    replica.hold_from = at
    n_alive = 0

    async def release_late(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        nonlocal n_alive
        n_alive += who == slow and raw == ALIVE
        if n_alive > ALIVE_PER_SILENCE:
            replica.release()
        return (raw,)

    outcome = await nodes.exchange(release_late, silence_s=SLOW_SILENCE_S)
    assert outcome.dial_error is outcome.answer_error is None
    assert [m.block for m in outcome.dialled.moved] == [BLOCK]
    assert n_alive > ALIVE_PER_SILENCE


async def test_a_replica_moves_even_if_its_partner_goes_while_it_waits_for_the_step_to_end() -> None:
    """The other has moved already: what is left undone here would pull the pair apart."""
    nodes, cable = pair(), Cable()
    (a,) = nodes.a
    a.hold_from = MOVE
    before = a.raw()

    async def go(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        if a.holds.is_set():
            asyncio.get_running_loop().call_soon(a.release)
            await cable.cut()
        return (raw,)

    cable.hook = go
    configs = [exchange_config(name, silence_s=SILENCE_S) for name in ("peer-a", "peer-b")]
    outcome = await exchange_in_memory((nodes.a_set, configs[0]), (nodes.b_set, configs[1]), (BLOCK,), cable)
    assert [m.block for m in outcome.dialled.moved] == [BLOCK]
    assert a.raw() != before


async def test_what_passes_one_way_is_no_silence_for_the_other() -> None:
    """A slow connection: the answer to the first piece comes only after many more have been sent."""
    cable = Cable(capacity=1)
    near, far = CableEnd(cable, "dialler", "answerer"), CableEnd(cable, "answerer", "dialler")
    wire = Wire(near, SLOW_SILENCE_S)
    receiving = asyncio.create_task(wire.receive())
    begun_s = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < begun_s + 1.5 * SLOW_SILENCE_S:
        await wire.send(b"x")
        await far.receive()
        await asyncio.wait({receiving}, timeout=SLOW_SILENCE_S / 8)
    await far.send(b"answer")
    assert await asyncio.wait_for(receiving, WAIT_S) == b"answer"


async def test_being_alive_adds_no_bytes_and_ends_nothing() -> None:
    cable = Cable(capacity=9)
    for raw in (ALIVE, ALIVE, b"one", ALIVE):
        await cable.put("answerer", raw)
    await cable.close("answerer")
    wire = Wire(CableEnd(cable, "dialler", "answerer"), SLOW_SILENCE_S)
    assert await wire.receive() == b"one"
    assert await wire.receive_or_end() is None
    assert wire.n_bytes == 3


async def test_an_error_of_the_work_itself_is_raised() -> None:
    async def fail() -> None:
        raise UnavailableError("the block is gone")

    with pytest.raises(UnavailableError, match="the block is gone"):
        await Wire(CableEnd(Cable(), "dialler", "answerer"), SILENCE_S).while_alive(fail())


class Resting(RateLimits):
    """Asks for rests longer than a partner's patience, after each message that is sent."""

    def sent(self, n_bytes: int) -> float:
        return 2 * SLOW_SILENCE_S


async def test_a_node_that_rests_for_its_owners_limit_is_not_taken_for_dead() -> None:
    cable = Cable()
    near = Wire(CableEnd(cable, "dialler", "answerer"), SLOW_SILENCE_S, Resting())
    far = Wire(CableEnd(cable, "answerer", "dialler"), SLOW_SILENCE_S)

    async def send() -> None:
        for raw in (b"one", b"two"):
            await near.send(raw)

    sending = asyncio.create_task(send())
    assert [await far.receive() for _ in range(2)] == [b"one", b"two"]
    assert not sending.done()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def test_what_has_come_is_read_on_before_its_sender_despairs() -> None:
    cable = Cable(capacity=3)
    for raw in (b"one", b"two"):
        await cable.put("answerer", raw)
    limited = RateLimits(Limits(down_bytes_per_s=500_000))
    limited.received(1 << 40)
    near = Wire(CableEnd(cable, "dialler", "answerer"), SLOW_SILENCE_S, limited)
    async with asyncio.timeout(WAIT_S):
        assert [await near.receive() for _ in range(2)] == [b"one", b"two"]

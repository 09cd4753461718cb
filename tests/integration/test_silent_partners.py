"""Frozen and slow partners over real gRPC."""

from __future__ import annotations

import asyncio

import pytest

from node.rpc.message_stream import ALIVE, ALIVE_PER_SILENCE, Wire
from tests.support.averaging_parts import BLOCK, MemoryReplica, averaging_node, make_state, two_replicas

WAIT_S = 20.0
COPY, MOVE = 2, 3  # of the calls of a replica


async def test_a_dialler_that_freezes_frees_the_answerer_for_others() -> None:
    a, b = two_replicas()
    before = a.raw(), b.raw()
    a.hold_from = COPY
    async with (
        # It would only say that it is alive long after its partner has lost patience.
        averaging_node("peer-a", a, silence_s=4 * WAIT_S) as node_a,
        averaging_node("peer-b", b, silence_s=0.5) as node_b,
        averaging_node("peer-c", MemoryReplica(make_state(9))) as node_c,
    ):
        dialling = asyncio.create_task(node_a.exchange_with(node_b))
        answered = await asyncio.wait_for(node_b.results.get(), WAIT_S)
        assert answered.problem == "the partner has been silent for 0.5 s"
        assert (a.raw(), b.raw()) == before
        assert [m.block for m in (await node_c.exchange_with(node_b)).blocks] == [BLOCK]
        a.release()
        result = await asyncio.wait_for(dialling, WAIT_S)
        assert result.problem == "the partner has been silent for 0.5 s"
        assert a.raw() == before[0]
        assert [m.block for m in (await node_a.exchange_with(node_b)).blocks] == [BLOCK]


@pytest.mark.parametrize("slow", ["dialler", "answerer"])
async def test_a_partner_that_is_slow_to_move_says_over_grpc_that_it_is_alive(
    slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two_replicas()
    replica = a if slow == "dialler" else b
    replica.hold_from = MOVE
    n_alive, send = 0, Wire.send

    async def release_late(wire: Wire, raw: bytes) -> None:
        nonlocal n_alive
        n_alive += raw == ALIVE
        if n_alive > ALIVE_PER_SILENCE:
            replica.release()
        await send(wire, raw)

    monkeypatch.setattr(Wire, "send", release_late)
    async with (
        averaging_node("peer-a", a, silence_s=2.0) as node_a,
        averaging_node("peer-b", b, silence_s=2.0) as node_b,
    ):
        result = await node_a.exchange_with(node_b)
        assert (result.problem, [m.block for m in result.blocks]) == ("", [BLOCK])
        assert (await asyncio.wait_for(node_b.results.get(), WAIT_S)).problem == ""

"""Who offers what and who holds which block: exchanges before, between and beside their blocks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import DeadlineError, InvalidInputError, LimitExceededError, NotHostedError, UnknownRunError
from node.averaging.replica_set import MAX_PARTNERS, Claim, ReplicaSet
from protocol import averaging_pb2 as pb
from protocol.limits import MAX_OFFERED_BLOCKS
from protocol.manifest import TRUNK, BlockId
from protocol.version import PROTOCOL_VERSION
from tests.support.averaging_faults import Pair, pair, spoil
from tests.support.averaging_parts import (
    BLOCK,
    N_ROWS,
    Cable,
    MemoryReplica,
    distance,
    exchange_config,
    exchange_in_memory,
    make_state,
    replica_set,
    two_replicas,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from common.errors import KilohiveError
    from tests.support.averaging_faults import Hook

BLOCKS = (BlockId(0, 0), BlockId(0, 1), TRUNK)
WAIT_S = 10.0


@pytest.mark.parametrize("patient", ["dialler", "answerer"])
async def test_a_partner_from_whom_no_offer_comes_costs_a_deadline(patient: str) -> None:
    async def never(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        return ()

    nodes = pair()
    a, b = (exchange_config(name, offer_timeout_s=0.05) for name in ("peer-a", "peer-b"))
    if patient == "dialler":
        a = replace(a, offer_timeout_s=10.0)
    else:
        b = replace(b, offer_timeout_s=10.0)
    outcome = await exchange_in_memory((nodes.a_set, a), (nodes.b_set, b), cable=Cable(never))
    error, what = (
        (outcome.answer_error, "offer") if patient == "dialler" else (outcome.dial_error, "answer to an offer")
    )
    assert isinstance(error, DeadlineError)
    assert str(error) == f"the {what} took longer than 0.1 s"


BAD_OFFERS: dict[str, tuple[Callable[[pb.ExchangeMessage], object], type[KilohiveError], str]] = {
    "another run": (lambda m: setattr(m.offer, "run_id", "other"), UnknownRunError, "run_id"),
    "another protocol": (
        lambda m: setattr(m.offer, "protocol_version", PROTOCOL_VERSION + 1),
        InvalidInputError,
        "protocol_version",
    ),
    "no peer id": (lambda m: setattr(m.offer, "peer_id", ""), InvalidInputError, "peer_id"),
    "a peer id of control characters": (
        lambda m: setattr(m.offer, "peer_id", "a\x1b[2J"),
        InvalidInputError,
        "peer_id",
    ),
    "an endless peer id": (lambda m: setattr(m.offer, "peer_id", "a" * 1000), InvalidInputError, "peer_id"),
    "a block twice": (lambda m: m.offer.blocks.add(block="0/0"), InvalidInputError, "blocks"),
    "not a block": (lambda m: m.offer.blocks.add(block="../0"), InvalidInputError, "blocks"),
    "too many blocks": (
        lambda m: m.offer.blocks.extend(pb.BlockOffer(block=f"1/{n}") for n in range(MAX_OFFERED_BLOCKS)),
        LimitExceededError,
        "blocks",
    ),
    "a message too long to be read": (
        lambda m: setattr(m.offer.blocks[0], "schema", b"x" * 1_000_000),
        LimitExceededError,
        "message bytes",
    ),
    "no offer": (lambda m: m.settle.CopyFrom(pb.Settle(block="0/0")), InvalidInputError, "message"),
}


@pytest.mark.parametrize("sender", ["dialler", "answerer"])
@pytest.mark.parametrize("name", list(BAD_OFFERS))
async def test_a_bad_offer_is_refused_before_any_block(sender: str, name: str) -> None:
    change, error_type, field = BAD_OFFERS[name]
    nodes = pair()
    outcome = await nodes.exchange(spoil(sender, "offer", change))
    error = outcome.answer_error if sender == "dialler" else outcome.dial_error
    assert type(error) is error_type
    assert isinstance(error, InvalidInputError)
    assert error.field == field
    assert not outcome.dialled.agreed
    assert outcome.dialled.moved == outcome.answered.moved == []


async def test_an_answer_from_another_peer_or_about_other_blocks_is_refused() -> None:
    other_peer = spoil("answerer", "offer", lambda m: setattr(m.offer, "peer_id", "peer-c"))
    other_blocks = spoil("answerer", "offer", lambda m: setattr(m.offer.blocks[0], "block", "3/3"))
    assert "peer_id: is 'peer-c'" in str((await pair().exchange(other_peer)).dial_error)
    assert "are not those of the offer" in str((await pair().exchange(other_blocks)).dial_error)


async def test_a_node_does_not_exchange_with_itself() -> None:
    nodes = pair()
    config = exchange_config("peer-a")
    outcome = await exchange_in_memory((nodes.a_set, config), (nodes.b_set, config))
    assert str(outcome.answer_error) == "peer_id: is this node's own"


async def test_bytes_that_are_no_message_are_refused() -> None:
    async def garbage(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        return (raw[:-3],) if who == "dialler" else (raw,)

    outcome = await pair().exchange(garbage)
    assert "are not a whole kilohive.v1.ExchangeMessage" in str(outcome.answer_error)


async def test_a_block_that_cannot_take_part_is_refused_by_its_reason_and_the_rest_goes_on() -> None:
    a, b = pair(blocks=BLOCKS).a, pair(blocks=BLOCKS).b
    other = make_state(3)
    other.params["extra"] = torch.zeros(N_ROWS, 2)
    gone, odd, fine = BLOCKS
    nodes = Pair(a, (MemoryReplica(other, odd), b[2]))
    outcome = await nodes.exchange()
    assert [m.block for m in outcome.dialled.moved] == [fine]
    assert outcome.dialled.refused == {
        gone: "not hosted there",
        odd: "its tensors there are of other names, shapes or types",
    }
    nodes.b_set.claim(fine, Claim(dialler="peer-c", pending=False))
    outcome = await nodes.exchange()
    assert outcome.dialled.refused[fine] == "in another exchange there"
    assert outcome.dialled.moved == []


async def test_an_unknown_reason_refuses_too() -> None:
    later = spoil("answerer", "offer", lambda m: setattr(m.offer.blocks[0], "reason", 77))
    outcome = await pair().exchange(later)
    assert outcome.dialled.refused == {BLOCK: "refused there for reason 77"}


async def test_blocks_that_are_busy_or_gone_here_are_not_offered() -> None:
    nodes = pair(blocks=BLOCKS)
    nodes.a_set.claim(BLOCKS[0], Claim(dialler="peer-c", pending=False))
    nodes.a_set.remove(BLOCKS[1])
    outcome = await nodes.exchange()
    assert outcome.dialled.refused == {BLOCKS[0]: "in another exchange here", BLOCKS[1]: "no longer hosted here"}
    assert [m.block for m in outcome.dialled.moved] == [TRUNK]


async def test_a_dialler_with_nothing_to_offer_says_nothing() -> None:
    nodes = pair()
    nodes.a_set.remove(BLOCK)
    outcome = await nodes.exchange()
    assert outcome.dial_error is outcome.answer_error is None
    assert not outcome.dialled.agreed
    assert not outcome.answered.agreed


async def test_a_block_given_up_in_the_middle_ends_the_exchange_without_a_move() -> None:
    nodes = pair()

    def gone(number: int) -> None:
        if number == 3:  # schema, copy, and now the move
            raise NotHostedError("block", "0/0 is no longer hosted here")

    nodes.b[0].before_call = gone
    before = nodes.raws()
    outcome = await nodes.exchange()
    assert isinstance(outcome.answer_error, NotHostedError)
    assert nodes.raws() == before


async def test_a_block_given_up_after_the_offer_is_left_out() -> None:
    nodes = pair(blocks=(BLOCK, TRUNK))

    def gone(number: int) -> None:
        if number == 2:
            raise NotHostedError("block", "0/0 is no longer hosted here")

    nodes.a[0].before_call = gone
    outcome = await nodes.exchange()
    assert outcome.dialled.refused == {BLOCK: "no longer hosted here"}
    assert [m.block for m in outcome.answered.moved] == [TRUNK]


@pytest.mark.parametrize("late", ["peer-a", "peer-b"])
async def test_of_two_exchanges_that_cross_the_one_with_the_smaller_dialler_moves_the_block(late: str) -> None:
    a, b = two_replicas()
    nodes = {
        "peer-a": (replica_set(a), exchange_config("peer-a")),
        "peer-b": (replica_set(b), exchange_config("peer-b")),
    }
    offers, answered = 0, asyncio.Event()
    both_offered = asyncio.Event()

    def cross(dialler: str) -> Hook:
        async def hook(who: str, number: int, raw: bytes) -> Sequence[bytes]:
            nonlocal offers
            if who == "dialler" and number == 0:
                offers += 1
                if offers == 2:
                    both_offered.set()
                await asyncio.wait_for(both_offered.wait(), WAIT_S)
                if dialler == late:
                    await asyncio.wait_for(answered.wait(), WAIT_S)
            elif who == "answerer" and number == 1:
                answered.set()
            return (raw,)

        return hook

    from_a, from_b = await asyncio.gather(
        exchange_in_memory(nodes["peer-a"], nodes["peer-b"], cable=Cable(cross("peer-a"))),
        exchange_in_memory(nodes["peer-b"], nodes["peer-a"], cable=Cable(cross("peer-b"))),
    )
    assert [m.block for m in from_a.dialled.moved] == [m.block for m in from_a.answered.moved] == [BLOCK]
    assert from_b.dialled.moved == from_b.answered.moved == []
    assert from_b.dialled.refused in ({BLOCK: "in another exchange there"}, {BLOCK: "in another exchange here"})
    assert distance(a, b) < 1e-6
    assert a.calls == b.calls == 3  # schema, copy, move


def test_a_claim_holds_a_block_until_it_is_released() -> None:
    held = replica_set(two_replicas()[0])
    first, second = Claim(dialler="b", pending=False), Claim(dialler="a", pending=False)
    assert held.claim(BLOCK, first)
    assert held.claim(BLOCK, first)
    assert not held.claim(BLOCK, second)
    held.release(BLOCK, second)
    assert not held.claim(BLOCK, second)
    held.release(BLOCK, first)
    assert held.claim(BLOCK, second)
    assert not held.claim(TRUNK, second)


def test_only_a_pending_claim_of_a_larger_dialler_gives_way() -> None:
    held = replica_set(two_replicas()[0])
    pending = Claim(dialler="m", pending=True)
    held.claim(BLOCK, pending)
    assert not held.claim(BLOCK, Claim(dialler="z", pending=False))
    taker = Claim(dialler="a", pending=False)
    assert held.claim(BLOCK, taker)
    held.release(BLOCK, pending)
    assert not held.claim(BLOCK, pending)
    held.release_all(taker)
    pending.pending = False
    assert held.claim(BLOCK, pending)
    assert not held.claim(BLOCK, taker)


def test_a_set_forgets_the_partner_met_longest_ago_and_everything_with_the_replica() -> None:
    replica, held = two_replicas()[0], ReplicaSet()
    held.add(replica)
    for n in range(MAX_PARTNERS):
        held.exchanged(replica, f"peer-{n}", torch.ones(N_ROWS))
    held.exchanged(replica, "peer-0", torch.full((N_ROWS,), 2.0))
    held.exchanged(replica, "one more", torch.ones(N_ROWS))
    assert held.learnt_before(BLOCK, "peer-1") is None
    learnt_R = held.learnt_before(BLOCK, "peer-0")
    assert learnt_R is not None
    assert torch.equal(learnt_R, torch.full((N_ROWS,), 2.0))
    held.remove(BLOCK)
    held.exchanged(replica, "late", torch.ones(N_ROWS))
    held.add(replica)
    assert held.learnt_before(BLOCK, "peer-0") is None
    assert held.learnt_before(BLOCK, "late") is None
    assert held.ids() == (BLOCK,)

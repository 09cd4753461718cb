"""One block's exchange, both sides joined in memory over a cable that tests cut, delay and spoil.

Shapes: R rows.
"""

from __future__ import annotations

import asyncio
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import DeadlineError, InvalidInputError, UnavailableError
from node.averaging import pieces
from node.averaging.replica_set import MOMENTS_EVERY
from node.model.replica_state import ReplicaState
from protocol import averaging_pb2 as pb
from protocol.manifest import TRUNK, BlockId
from tests.support.averaging_faults import Pair, kind, late_answer, pair, spoil, spoil_tensor
from tests.support.averaging_parts import (
    BLOCK,
    N_ROWS,
    Cable,
    MemoryReplica,
    changed,
    distance,
    exchange_config,
    exchange_in_memory,
    make_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from protocol.manifest import AveragingCodec
    from tests.support.averaging_faults import Hook

CODECS: list[AveragingCodec] = ["fp32", "bf16", "int8"]
BLOCKS = (BlockId(0, 0), BlockId(0, 1), TRUNK)
WAIT_S = 10.0


@pytest.mark.parametrize("codec", CODECS)
async def test_replicas_meet_and_their_mean_stays(codec: AveragingCodec) -> None:
    nodes = pair(codec)
    (a,), (b,) = nodes.a, nodes.b
    before, means = distance(a, b), {n: (a.params()[n] + b.params()[n]) / 2 for n in a.params()}
    for _ in range(1 if codec == "fp32" else 2):
        outcome = await nodes.exchange()
        assert outcome.dial_error is outcome.answer_error is None
    assert before > 1e-2
    assert distance(a, b) < (1e-6 if codec == "fp32" else 1e-3)
    for name, mean in means.items():
        torch.testing.assert_close((a.params()[name] + b.params()[name]) / 2, mean, rtol=1e-5, atol=1e-6)


async def test_both_sides_tell_the_same_distance_and_where_they_stand() -> None:
    nodes = pair()
    (a,), (b,) = nodes.a, nodes.b
    expected = distance(a, b), distance(b, a)
    outcome = await nodes.exchange()
    (dialled,), (answered,) = outcome.dialled.moved, outcome.answered.moved
    assert (dialled.divergence, answered.divergence) == pytest.approx(expected, rel=1e-5)
    assert dialled.version_gap == answered.version_gap == 1
    assert a.version == b.version == 7
    assert torch.equal(a.state.steps_R, torch.full((N_ROWS,), 7))


async def test_moments_meet_too_and_squares_stay_squares() -> None:
    nodes = pair("int8")
    (a,), (b,) = nodes.a, nodes.b
    mean = (a.state.second["w_in"] + b.state.second["w_in"]) / 2
    await nodes.exchange()
    torch.testing.assert_close(a.state.second["w_in"], mean, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(b.state.second["w_in"], mean, rtol=1e-2, atol=1e-3)
    assert float(a.state.second["w_in"].min()) >= 0


async def test_moments_and_their_steps_travel_with_the_first_exchange_of_a_pair_and_then_every_eighth() -> None:
    nodes = pair()
    (a,), (b,) = nodes.a, nodes.b
    met, bytes_of = [], []
    for _ in range(2 * MOMENTS_EVERY + 1):
        a.state.second["w_in"].fill_(0.5)
        b.state.second["w_in"].fill_(0.1)
        a.train(0.1)
        b.train(0.2)
        b.state.steps_R += 1
        sizes: list[int] = []
        outcome = await nodes.exchange(weigh(sizes))
        assert outcome.dial_error is outcome.answer_error is None
        assert distance(a, b) < 1e-6, "weights meet every time"
        has_met = bool((a.state.second["w_in"] < 0.5).all())
        assert bool((b.state.second["w_in"] > 0.1).all()) is has_met
        assert torch.equal(a.state.steps_R, b.state.steps_R) is has_met
        met.append(has_met)
        bytes_of.append(sum(sizes))
    assert [i for i, has_met in enumerate(met) if has_met] == [0, MOMENTS_EVERY, 2 * MOMENTS_EVERY]
    assert bytes_of[1] < 0.5 * bytes_of[0]


def weigh(sizes: list[int]) -> Hook:
    async def hook(_who: str, _number: int, raw: bytes) -> Sequence[bytes]:
        sizes.append(len(raw))
        return (raw,)

    return hook


@pytest.mark.parametrize("codec", CODECS)
async def test_a_cable_cut_in_an_exchange_of_weights_alone_leaves_the_block_whole(codec: AveragingCodec) -> None:
    nodes = pair(codec)
    (a,), (b,) = nodes.a, nodes.b
    await nodes.exchange()
    a.train(0.3)
    before = nodes.raws()
    outcome = await nodes.exchange(cut_at("piece"))
    assert outcome.dial_error is not None
    assert nodes.raws() == before
    await nodes.exchange()
    await nodes.exchange()
    assert distance(a, b) < (1e-6 if codec == "fp32" else 1e-3)


@pytest.mark.parametrize("sender", ["dialler", "answerer"])
async def test_a_partner_that_does_not_answer_with_moments_as_asked_is_refused(sender: str) -> None:
    nodes = pair()
    before = nodes.raws()
    spoiled = spoil(sender, "start", lambda m: setattr(m.start, "weights_only", True))

    async def hook(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        if who == "dialler" and kind(raw) == "piece":
            # Asked for weights alone, the answerer would stumble over moments, perhaps before the dialler over Start.
            await asyncio.Event().wait()
        return await spoiled(who, number, raw)

    outcome = await nodes.exchange(hook)
    assert isinstance(outcome.dial_error, InvalidInputError)
    assert str(outcome.dial_error) == "weights_only: is True, must be False as was asked"
    assert nodes.raws() == before


def cut_at(what: str) -> Hook:
    async def hook(_who: str, _number: int, raw: bytes) -> Sequence[bytes]:
        if kind(raw) == what:
            raise UnavailableError("cut")
        return (raw,)

    return hook


async def test_a_replica_that_has_learnt_more_pulls_harder() -> None:
    nodes = pair(learnt=300.0)  # B's; A has learnt from 100 tokens
    (a,), (b,) = nodes.a, nodes.b
    from_a, from_b = a.params(), b.params()
    outcome = await nodes.exchange()
    assert [result.partner_share for result in (*outcome.dialled.moved, *outcome.answered.moved)] == [0.75, 0.25]
    for name, p in a.params().items():
        torch.testing.assert_close(p, from_a[name] + 0.75 * (from_b[name] - from_a[name]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p, b.params()[name], rtol=1e-5, atol=1e-6)


async def test_only_what_was_learnt_since_the_last_exchange_of_the_pair_counts() -> None:
    nodes = pair()
    (a,), (b,) = nodes.a, nodes.b
    await nodes.exchange()
    both = a.params()
    a.train(0.5, n_tokens=40)
    await nodes.exchange()
    for name, p in b.params().items():
        torch.testing.assert_close(p, both[name] + 0.5, rtol=1e-5, atol=1e-5)  # A alone has learnt: B takes it all


async def test_a_joiner_that_has_learnt_nothing_moves_all_the_way() -> None:
    one = make_state(1)
    a, b = MemoryReplica(make_state(2, base=one, learnt=0.0)), MemoryReplica(one)
    from_b = b.params()
    await Pair((a,), (b,)).exchange()
    for name, p in b.params().items():
        assert torch.equal(p, from_b[name])
        torch.testing.assert_close(a.params()[name], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("trains", ["dialler", "answerer"])
async def test_training_that_goes_on_during_an_exchange_is_not_lost(codec: AveragingCodec, trains: str) -> None:
    still, moving = pair(codec), pair(codec)
    replica = (moving.a if trains == "dialler" else moving.b)[0]

    async def train_at_each_piece(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        if who == "answerer" and kind(raw) == "piece":
            replica.train(0.01)
        return (raw,)

    await still.exchange()
    await moving.exchange(train_at_each_piece)
    alone = (still.a if trains == "dialler" else still.b)[0]
    n_pieces = 3 * len(alone.state.params)
    for name, p in replica.params().items():
        torch.testing.assert_close(p, alone.params()[name] + 0.01 * n_pieces, rtol=1e-5, atol=1e-5)


async def test_a_run_in_float64_exchanges_without_loss() -> None:
    nodes = pair(dtype=torch.float64)
    await nodes.exchange(dtype="fp64")
    assert distance(nodes.a[0], nodes.b[0]) < 1e-15


@pytest.mark.parametrize("codec", CODECS)
async def test_a_cable_cut_at_any_message_leaves_each_block_whole(codec: AveragingCodec) -> None:
    blocks = (BLOCK, TRUNK)
    clean = pair(codec, blocks)
    before, cable = clean.raws(), Cable()
    a, b = exchange_config("peer-a", codec=codec), exchange_config("peer-b", codec=codec)
    await exchange_in_memory((clean.a_set, a), (clean.b_set, b), blocks, cable)
    after, kinds = clean.raws(), set()
    for at in range(cable.n_messages):
        nodes = pair(codec, blocks)
        broken = Cable()

        async def cut(who: str, number: int, raw: bytes, at: int = at, broken: Cable = broken) -> Sequence[bytes]:
            if number >= at:
                await broken.cut()
            return (raw,)

        broken.hook = cut
        outcome = await exchange_in_memory((nodes.a_set, a), (nodes.b_set, b), blocks, broken)
        assert outcome.dial_error is not None
        states = [
            (a_raw in {was[0], will[0]}, b_raw in {was[1], will[1]}, a_raw == will[0], b_raw == will[1])
            for (a_raw, b_raw), was, will in zip(nodes.raws(), before, after, strict=True)
        ]
        assert all(a_whole and b_whole for a_whole, b_whole, _, _ in states)
        assert all(b_moved or not a_moved for _, _, a_moved, b_moved in states)  # only the answerer may move alone
        assert [m.block for m in outcome.dialled.moved] == [b for b, s in zip(blocks, states, strict=True) if s[2]]
        kinds |= {(a_moved, b_moved) for _, _, a_moved, b_moved in states}
        again = await exchange_in_memory((nodes.a_set, a), (nodes.b_set, b), blocks)
        assert [m.block for m in again.dialled.moved] == list(blocks)
        assert again.dial_error is None
    assert kinds == {(False, False), (False, True), (True, True)}


async def test_what_was_finished_stays_and_the_block_that_broke_is_named() -> None:
    nodes = pair(blocks=BLOCKS)
    before = nodes.raws()

    async def spoil_second_block(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        message = pb.ExchangeMessage.FromString(raw)
        if who == "answerer" and message.start.block == "0/1":
            return (changed(raw, lambda m: m.start.work.append(1.0)),)
        return (raw,)

    outcome = await nodes.exchange(spoil_second_block)
    after = nodes.raws()
    assert [m.block for m in outcome.dialled.moved] == [BLOCKS[0]]
    assert outcome.dialled.refused == {BLOCKS[1]: "work: has 4 values, must have 3"}
    assert before[0] != after[0]
    assert before[1:] == after[1:]
    assert [m.block for m in (await nodes.exchange()).dialled.moved] == list(BLOCKS)


@pytest.mark.parametrize("sender", ["dialler", "answerer"])
async def test_messages_in_another_order_are_refused(sender: str) -> None:
    held: list[bytes] = []

    async def swap(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        if who != sender or kind(raw) != "piece" or len(held) > 1:
            return (raw,)
        held.append(raw)
        return () if len(held) == 1 else held[::-1]

    nodes = pair()
    before = nodes.raws()
    # The answerer answers one by one: it would keep the piece back for ever.
    outcome = await nodes.exchange(swap if sender == "dialler" else late_answer(), block_timeout_s=WAIT_S)
    error = outcome.answer_error if sender == "dialler" else outcome.dial_error
    assert isinstance(error, InvalidInputError)
    assert error.field == "tensor"
    assert nodes.raws() == before


@pytest.mark.parametrize("sender", ["dialler", "answerer"])
async def test_a_flipped_byte_is_noticed_by_its_piece(sender: str) -> None:
    def flip(message: pb.ExchangeMessage) -> None:
        data = message.piece.values.data
        message.piece.values.data = data[:-1] + bytes([data[-1] ^ 1])

    nodes = pair()
    before = nodes.raws()
    outcome = await nodes.exchange(spoil(sender, "piece", flip))
    error = outcome.answer_error if sender == "dialler" else outcome.dial_error
    assert isinstance(error, InvalidInputError)
    assert str(error) == "first.w_in hash: does not fit the piece"
    assert nodes.raws() == before


BAD_TENSORS = {
    "negative squares": ("second.w_in", torch.tensor(-0.1), "second.w_in", "an average of squares cannot be"),
    "squares over the limit": ("second.w_out", torch.tensor(1.1), "second.w_out", "the limit is 1.01"),
    "weights that are not finite": ("params.w_in", torch.tensor(float("nan")), "params.w_in", "holds NaN"),
    "moments that are not finite": ("first.w_in", torch.tensor(float("inf")), "first.w_in", "holds NaN or infinity"),
}


@pytest.mark.parametrize("sender", ["dialler", "answerer"])
@pytest.mark.parametrize("name", list(BAD_TENSORS))
async def test_bad_values_are_refused_before_anything_moves(sender: str, name: str) -> None:
    tensor, value, field, problem = BAD_TENSORS[name]
    nodes = pair()
    before = nodes.raws()
    outcome = await nodes.exchange(spoil_tensor(sender, tensor, value))
    error = outcome.answer_error if sender == "dialler" else outcome.dial_error
    assert isinstance(error, InvalidInputError)
    assert error.field == field
    assert problem in str(error)
    assert nodes.raws() == before


BAD_STARTS: dict[str, tuple[Callable[[pb.ExchangeMessage], object], str]] = {
    "another block": (lambda m: setattr(m.start, "block", "7/7"), "block"),
    "work of too few rows": (lambda m: m.start.work.pop(), "work"),
    "work that is not a number": (lambda m: m.start.work.__setitem__(0, float("nan")), "work"),
    "negative work": (lambda m: m.start.work.__setitem__(0, -1.0), "work"),
    "steps of too many rows": (lambda m: m.start.steps.append(1), "steps"),
    "steps beyond any run": (lambda m: m.start.steps.__setitem__(0, 2**64 - 1), "version and steps"),
    "a version beyond any run": (lambda m: setattr(m.start, "version", 2**64 - 1), "version and steps"),
    "a piece in its place": (lambda m: m.piece.CopyFrom(pb.Piece(tensor="first.w_in")), "message"),
    "nothing in its place": (lambda m: m.ClearField("start"), "message"),
}


@pytest.mark.parametrize("sender", ["dialler", "answerer"])
@pytest.mark.parametrize("name", list(BAD_STARTS))
async def test_a_bad_start_is_refused_by_field(sender: str, name: str) -> None:
    change, field = BAD_STARTS[name]
    nodes = pair()
    before = nodes.raws()
    outcome = await nodes.exchange(spoil(sender, "start", change))
    error = outcome.answer_error if sender == "dialler" else outcome.dial_error
    assert isinstance(error, InvalidInputError)
    assert error.field == field
    assert nodes.raws() == before


async def test_an_answer_to_a_piece_that_was_not_sent_is_refused() -> None:
    """Else the difference would be added to memory that nothing has been written to."""
    asked, held = asyncio.Event(), pair()
    answers: list[bytes] = []

    async def record(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        if who == "answerer" and kind(raw) == "piece":
            answers.append(raw)
        return (raw,)

    await pair().exchange(record)

    async def run_ahead(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        if who == "dialler" and kind(raw) == "piece":
            if asked.is_set():
                await asyncio.Event().wait()  # until the exchange is over
            asked.set()
        elif who == "answerer" and kind(raw) == "piece":
            return answers
        return (raw,)

    before = held.raws()
    outcome = await held.exchange(run_ahead, window_pieces=1)
    assert str(outcome.dial_error) == "message: answers a piece that was not sent yet"
    assert held.raws() == before


@pytest.mark.parametrize("exact", [True, False])
async def test_a_settlement_that_does_not_fit_what_was_sent_is_refused(exact: bool) -> None:
    nodes = pair("fp32" if not exact else "bf16")
    before = nodes.raws()
    outcome = await nodes.exchange(spoil("dialler", "settle", lambda m: setattr(m.settle, "exact", exact)))
    assert isinstance(outcome.answer_error, InvalidInputError)
    assert outcome.answer_error.field == "exact"
    assert nodes.raws() == before


async def test_at_most_a_window_of_pieces_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_PIECE_BYTES", 256)
    window, full = 4, asyncio.Event()
    ahead, most = 0, 0

    async def hold_until_full(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        nonlocal ahead, most
        if kind(raw) != "piece":
            return (raw,)
        if who == "answerer":
            await asyncio.wait_for(full.wait(), WAIT_S)
        ahead += 1 if who == "dialler" else -1
        most = max(most, ahead)
        if most >= window:
            full.set()
        return (raw,)

    outcome = await pair().exchange(hold_until_full, capacity=100, window_pieces=window)
    assert outcome.dial_error is outcome.answer_error is None
    assert most == window


async def test_a_partner_that_falls_silent_costs_a_deadline_and_frees_the_block() -> None:
    nodes = pair()

    async def never(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        return () if who == "answerer" and kind(raw) == "piece" else (raw,)

    outcome = await nodes.exchange(never, block_timeout_s=0.1)
    assert isinstance(outcome.dial_error, DeadlineError)
    assert "block 0/0 took longer than" in str(outcome.dial_error)
    assert (await nodes.exchange()).dial_error is None


async def test_a_snapshot_is_taken_once_per_side_and_no_replica_is_touched_but_by_its_move() -> None:
    nodes = pair("int8")
    calls: list[str] = []
    looks: list[str] = []

    def spy(real: Any, seen: list[str], function: Any) -> Any:
        seen.append(function.__name__)
        return real(function)

    for replica in (*nodes.a, *nodes.b):
        replica.call = partial(spy, replica.call, calls)  # type: ignore[method-assign]
        replica.look = partial(spy, replica.look, looks)  # type: ignore[method-assign]
    await nodes.exchange()
    assert calls == ["<lambda>", "<lambda>"]
    assert sorted(looks) == [ReplicaState.copy.__name__, "copy", "schema", "schema"]


async def test_a_snapshot_is_given_back_before_the_move_takes_as_much_memory_again() -> None:
    nodes = pair("int8")
    (a,), (b,) = nodes.a, nodes.b
    copied: list[weakref.ref[torch.Tensor]] = []
    alive_at_move: list[int] = []
    for replica in (a, b):
        real = replica.call
        own: list[weakref.ref[torch.Tensor]] = []

        def watch(function: Any, real: Any = real, own: Any = own) -> Any:
            if function is not ReplicaState.copy:
                alive_at_move.append(sum(t() is not None for t in own))
                return real(function)
            done = real(function)
            own += [weakref.ref(t) for t in done.result().named().values()]
            copied.extend(own)
            return done

        replica.call = replica.look = watch  # type: ignore[method-assign]
    await nodes.exchange()
    assert len(copied) == 2 * len(a.state.named())
    assert alive_at_move == [0, 0, 0, 0]  # both schemas, both moves

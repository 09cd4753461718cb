"""One block between two replicas: both sides' snapshots, the pieces that pass between them, the moves that follow.

Pairwise gossip of differences: the dialler sends its weights as the codec leaves them (a_hat), the answerer what it has
more than that (d = Q(b - a_hat)), and the dialler settles the difference that both then apply: Q(d + a_hat - a), about
b - a. Small numbers lose little to quantisation, and what is lost stays in the replicas' difference, so that the next
exchange corrects it: error feedback without memory (compare arXiv 1907.09356). Both apply the same difference, so where
they go halves, the replicas' mean does not change, whatever the codec.

Nothing is applied before everything has come and been checked. Memory: snapshot, differences and partner's moments of
one block.

Shapes: R rows, V values of one piece, flattened.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.errors import InvalidInputError, LimitExceededError
from common.tasks import both, within
from node.averaging.gossip import MAX_LEAD_STEPS, Move, apply_move, checked_moments, share_R
from node.averaging.messages import MAX_PIECE_MESSAGE_BYTES, require, unpack
from node.averaging.pieces import Incoming, Slot, TensorBuffers, cut, flattened, piece_codec, sent_as
from node.model.replica_state import ReplicaState, schema
from protocol import averaging_pb2 as pb
from protocol.limits import MAX_RUN_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from node.averaging.gossip import GossipLimits
    from node.averaging.replica import AveragedReplica
    from node.rpc.message_stream import Wire
    from protocol.manifest import AveragingCodec, BlockId, Dtype

START_BYTES = 1024
START_BYTES_PER_ROW = 32


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How a node exchanges. A block may take `block_timeout_s` and what its bytes take at the slowest rate.

    `silence_s`: how long nothing at all may pass in a running exchange, in either direction; a piece that takes longer
    on its way is silence too. Blocks of more than `max_block_bytes` are not exchanged: it would take too long.
    """

    run_id: str
    peer_id: str
    codec: AveragingCodec
    dtype: Dtype
    limits: Callable[[BlockId], GossipLimits]
    block_timeout_s: float = 20.0
    offer_timeout_s: float = 10.0
    silence_s: float = 5.0
    slowest_bytes_per_s: int = 1 << 17
    window_pieces: int = 8
    max_block_bytes: float = math.inf

    def transfer_timeout_s(self, state: ReplicaState) -> float:
        """Return how long a replica takes over the slowest connection, both ways one after the other."""
        n_bytes = sum(t.numel() * t.itemsize for t in state.named().values())
        return self.block_timeout_s + self.bytes_timeout_s(n_bytes)

    def bytes_timeout_s(self, n_bytes: int) -> float:
        """Return how long so many bytes may take, both ways one after the other."""
        return 2 * n_bytes / self.slowest_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What an exchange did to one block here; `divergence` was before it, relative to this replica's norm.

    `version` is what both replicas have come to; one of them is ahead of it once it has learnt something since.
    `partner_share` is the partner's part of what both had learnt since they last met, 0 to 1, mean over the rows.
    `moved` is how far exchanges have moved the block here in all, this one included, when it had just moved.
    """

    block: BlockId
    divergence: float
    clipped_rows: int
    version_gap: int
    version: int
    partner_share: float
    moved: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExchangeResult:
    """One exchange as this node saw it. `blocks` have moved; `refused` says for each of the others why not.

    `busy` are the refused ones that another exchange had. `n_bytes` counts messages both ways; `problem` is why it
    ended early, if it did.
    """

    partner: str
    dialled: bool
    blocks: tuple[BlockResult, ...]
    refused: Mapping[BlockId, str]
    n_bytes: int
    seconds: float
    problem: str = ""
    busy: frozenset[BlockId] = frozenset()


class Side:
    """One side of one block: its own snapshot, and the partner's tensors as they come. Its methods may run anywhere.

    With `weights_only` neither side sends moments, and the snapshot has none.
    """

    def __init__(
        self,
        block_id: BlockId,
        own: ReplicaState,
        learnt_before_R: torch.Tensor | None,
        config: ExchangeConfig,
        *,
        weights_only: bool = False,
    ) -> None:
        tensors = schema(own)
        self.block_id, self.own, self.config = block_id, own, config
        self.weights_only = weights_only
        self.slots = cut(tensors)
        self.weight_slots = tuple(slot for slot in self.slots if slot.is_weights)
        self.work_R = own.learnt_R if learnt_before_R is None else (own.learnt_R - learnt_before_R).clamp(min=0)
        self._flat = flattened(own.named())
        self._store = TensorBuffers(tensors)
        self._incoming = Incoming(self.slots, config.codec, config.dtype)

    def start(self) -> bytes:
        """The message that begins the block."""
        own = self.own
        start = pb.Start(
            block=str(self.block_id),
            version=own.version,
            work=self.work_R.tolist(),
            steps=own.steps_R.tolist(),
            weights_only=self.weights_only,
        )
        return pb.ExchangeMessage(start=start).SerializeToString()

    def meet(self, start: pb.Start) -> None:
        """Check the partner's Start; raises InvalidInputError."""
        if start.block != str(self.block_id):
            raise InvalidInputError("block", f"is {start.block[:40]!r}, must be {str(self.block_id)!r}")
        if start.weights_only is not self.weights_only:
            raise InvalidInputError(
                "weights_only", f"is {start.weights_only}, must be {self.weights_only} as was asked"
            )
        work_R, self._steps_R = counters_of(start, len(self.own.steps_R))
        self._alpha_R = share_R(self.work_R, work_R)
        self._version = start.version

    def check(self) -> None:
        """Check the partner's moments once they are whole; raises InvalidInputError. Runs before anything moves."""
        limits = self.config.limits(self.block_id)
        checked_moments(self._store.group("first"), self._store.group("second"), limits)

    def move(self) -> Move:
        """What this side does now that both know the difference.

        Comes last: the snapshot's tensors are given back, as the move itself takes as much memory again.
        """
        move = Move(
            delta=self._difference(),
            alpha_R=self._alpha_R,
            first=self._store.group("first"),
            second=self._store.group("second"),
            steps_R=self._steps_R,
            version=self._version,
        )
        self._flat.clear()
        for _, tensors in self.own.groups():
            tensors.clear()
        return move

    def _difference(self) -> dict[str, torch.Tensor]:
        return self._store.group("params")

    def _sent(self, slot: Slot, values_V: torch.Tensor) -> tuple[bytes, torch.Tensor]:
        return sent_as(slot, values_V, piece_codec(slot, self.config.codec, self.config.dtype))

    def _sent_and_kept(self, slot: Slot, difference_V: torch.Tensor) -> bytes:
        """A difference from the store, which then holds it as the partner will read it."""
        packed, read_V = self._sent(slot, difference_V)
        if read_V is not difference_V:
            difference_V.copy_(read_V)
        return packed


class DialledSide(Side):
    """The side that dialled: sends first, settles, moves last."""

    exact = True
    """Whether the codec lost nothing of the weights, so that the answered difference is the settled one."""
    _asked = 0

    def ask(self, slot: Slot) -> bytes:
        """The slot's piece. What its codec loses of weights waits in the store for the answer."""
        own_V = slot.of(self._flat)
        packed, read_V = self._sent(slot, own_V)
        if slot.is_weights:
            lost_V = slot.of(self._store.flat)
            torch.sub(read_V, own_V, out=lost_V)
            self.exact = self.exact and (read_V is own_V or not bool(lost_V.any()))
        self._asked += 1
        return packed

    def take_answer(self, raw: bytes) -> None:
        """The partner's difference or moments; raises InvalidInputError."""
        message = unpack(raw, MAX_PIECE_MESSAGE_BYTES)
        require(message, "piece")
        if self._incoming.taken >= self._asked:
            raise InvalidInputError("message", "answers a piece that was not sent yet")
        slot, values_V = self._incoming.take(message.piece)
        there_V = slot.of(self._store.flat)
        if slot.is_weights:
            there_V.add_(values_V)
        else:
            there_V.copy_(values_V)

    def settle(self, slot: Slot) -> bytes:
        """The slot's settled difference, kept as the partner will read it."""
        return self._sent_and_kept(slot, slot.of(self._store.flat))


class AnsweringSide(Side):
    """The side that was dialled: answers piece by piece, moves first."""

    _settled: Incoming | None = None

    def answer(self, raw: bytes) -> bytes:
        """The answer to one piece: the difference of weights, or one's own moments; raises InvalidInputError."""
        message = unpack(raw, MAX_PIECE_MESSAGE_BYTES)
        require(message, "piece")
        slot, values_V = self._incoming.take(message.piece)
        own_V = slot.of(self._flat)
        if not slot.is_weights:
            slot.of(self._store.flat).copy_(values_V)
            return self._sent(slot, own_V)[0]
        return self._sent_and_kept(slot, torch.sub(own_V, values_V, out=slot.of(self._store.flat)))

    def take_settlement(self, raw: bytes) -> bool:
        """One settled piece, or the end of them (True); raises InvalidInputError."""
        message = unpack(raw, MAX_PIECE_MESSAGE_BYTES)
        kind = require(message, "piece", "settle")
        if self._settled is None:
            self._settled = Incoming(self.weight_slots, self.config.codec, self.config.dtype)
        if kind == "piece":
            slot, values_V = self._settled.take(message.piece)
            slot.of(self._store.flat).copy_(values_V)
            return False
        if message.settle.block != str(self.block_id):
            raise InvalidInputError("block", f"is {message.settle.block[:40]!r}, must be {str(self.block_id)!r}")
        if self._settled.taken if message.settle.exact else not self._settled.done:
            raise InvalidInputError("exact", f"is {message.settle.exact} after {self._settled.taken} settled pieces")
        return True

    def _difference(self) -> dict[str, torch.Tensor]:
        # What was settled is the dialler's.
        return {name: delta.neg_() for name, delta in super()._difference().items()}


async def dial_block(wire: Wire, replica: AveragedReplica, side: DialledSide) -> BlockResult:
    """Exchange one block as its dialler. The replica has moved, whole, when this returns, and not at all if it raises.

    Raises:
        KilohiveError: the partner's, or of what it sent; DeadlineError; whatever the replica's `call` raises.
    """
    async with within(side.config.transfer_timeout_s(side.own), f"block {side.block_id}"):
        await wire.send(side.start())
        window = asyncio.Semaphore(side.config.window_pieces)
        await both(_ask(wire, side, window), _take_answers(wire, side, window))
        await _check(wire, side)
        for slot in () if side.exact else side.weight_slots:
            await wire.send(await asyncio.to_thread(side.settle, slot))
        await wire.send(_settle(side, exact=side.exact))
        require(unpack(await wire.receive(), START_BYTES), "settle")
        return await _apply(wire, replica, side)


async def answer_block(wire: Wire, replica: AveragedReplica, side: AnsweringSide, start: pb.Start) -> BlockResult:
    """Exchange one block as the one that was dialled; the same promises as `dial_block`.

    The dialler waits for `settled` afterwards: if it never comes, this replica alone has moved.
    """
    async with within(side.config.transfer_timeout_s(side.own), f"block {side.block_id}"):
        side.meet(start)
        await wire.send(side.start())
        for _ in side.slots:
            await wire.send(await asyncio.to_thread(side.answer, await wire.receive()))
        await _check(wire, side)
        while not await asyncio.to_thread(side.take_settlement, await wire.receive()):
            pass
        return await _apply(wire, replica, side)


def settled(side: Side) -> bytes:
    """What the answering side says once it has moved."""
    return _settle(side, exact=False)


def counters_of(start: pb.Start, n_rows: int, *, with_work: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """`work_R` (not checked further) and `steps_R` of `n_rows` rows; InvalidInputError for what does not fit."""
    for field, values, wanted in (("work", start.work, n_rows * with_work), ("steps", start.steps, n_rows)):
        if len(values) != wanted:
            raise InvalidInputError(field, f"has {len(values)} values, must have {wanted}")
    largest = max((start.version, *start.steps))
    if largest > MAX_RUN_TOKENS:
        raise LimitExceededError("version and steps", largest, MAX_RUN_TOKENS)
    return torch.tensor(start.work, dtype=torch.float64), torch.tensor(start.steps, dtype=torch.int64)


async def _ask(wire: Wire, side: DialledSide, window: asyncio.Semaphore) -> None:
    for slot in side.slots:
        await window.acquire()
        await wire.send(await asyncio.to_thread(side.ask, slot))


async def _take_answers(wire: Wire, side: DialledSide, window: asyncio.Semaphore) -> None:
    """Never waits for a send, so that two full directions cannot wait for each other."""
    message = unpack(await wire.receive(), START_BYTES + START_BYTES_PER_ROW * len(side.work_R))
    require(message, "start")
    side.meet(message.start)
    for _ in side.slots:
        await asyncio.to_thread(side.take_answer, await wire.receive())
        window.release()


async def _check(wire: Wire, side: Side) -> None:
    if not side.weights_only:
        await wire.while_alive(asyncio.to_thread(side.check))


async def _apply(wire: Wire, replica: AveragedReplica, side: Side) -> BlockResult:
    limits = side.config.limits(side.block_id)
    move = side.move()
    moved = replica.call(lambda state: apply_move(state, move, limits))
    applied = await wire.while_alive(asyncio.wrap_future(moved))
    own_version, shares_R = side.own.version, move.alpha_R
    return BlockResult(
        block=side.block_id,
        divergence=applied.divergence,
        clipped_rows=applied.clipped_rows,
        version_gap=abs(own_version - move.version),
        version=max(own_version, min(move.version, own_version + MAX_LEAD_STEPS)),
        partner_share=float(shares_R.mean()),
    )


def _settle(side: Side, *, exact: bool) -> bytes:
    return pb.ExchangeMessage(settle=pb.Settle(block=str(side.block_id), exact=exact)).SerializeToString()

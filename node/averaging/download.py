"""A replica's whole state from one peer to another, piece by piece, without loss. Both sides."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

import torch

from common.errors import InvalidInputError
from node.averaging.exchange import START_BYTES, START_BYTES_PER_ROW, counters_of
from node.averaging.gossip import checked_moments
from node.averaging.messages import MAX_PIECE_MESSAGE_BYTES, require, unpack
from node.averaging.pieces import Incoming, cut, flattened, piece_message, wanted_tensors
from node.model.replica_state import ReplicaState, schema
from protocol import averaging_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from node.averaging.exchange import ExchangeConfig
    from node.averaging.partial import PartialReplica
    from node.averaging.pieces import Slot
    from node.rpc.message_stream import Inbox, Wire
    from protocol.manifest import BlockId


async def send_state(
    wire: Wire, block_id: BlockId, state: ReplicaState, config: ExchangeConfig, request: pb.DownloadRequest
) -> None:
    """Send a copy of a replica, from the piece on that is asked for.

    Raises:
        InvalidInputError: there are not so many pieces.
        KilohiveError: what the stream's `send` does.
    """
    first, slots = request.first_piece, cut(wanted_tensors(schema(state), params_only=request.params_only))
    if first > len(slots):
        raise InvalidInputError("first_piece", f"is {first}, block {block_id} has {len(slots)} pieces")
    start = pb.Start(block=str(block_id), version=state.version, steps=state.steps_R.tolist())
    start.first_piece, start.listens = first, True
    await wire.send(pb.ExchangeMessage(start=start).SerializeToString())
    flat = await asyncio.to_thread(flattened, state.named())
    for slot in slots[first:]:
        await wire.send(await asyncio.to_thread(_packed, slot, flat, config))
    # A call that ends while its caller still speaks would be lost to it, with all that it has not read yet.
    while await wire.receive_or_end() is not None:
        pass


class CallingSide(Protocol):
    """The call that a download comes by."""

    @property
    def inbox(self) -> Inbox:
        """What comes."""

    def saying_alive(self) -> AbstractAsyncContextManager[None]:
        """Meanwhile the sender is told that this node is alive, whatever it rests for."""

    async def done(self) -> None:
        """End this side of the call."""


class Download:
    """The pieces of a replica that are missing in `partial`, as `sender` sends them: its schema says what may come."""

    def __init__(self, partial: PartialReplica, sender: str, config: ExchangeConfig) -> None:
        self.partial, self._sender, self._config = partial, sender, config

    def request(self) -> bytes:
        """The message that asks for them."""
        partial = self.partial
        return pb.DownloadRequest(
            run_id=self._config.run_id,
            block=str(partial.block_id),
            params_only=partial.params_only,
            first_piece=partial.taken,
        ).SerializeToString()

    async def receive(self, caller: CallingSide, tell: Callable[[int], None] | None) -> ReplicaState:
        """The whole state; `tell` is called with the bytes that have come so far. What came stays in `partial`.

        Raises:
            InvalidInputError: a piece that is not the one due, moments out of range, or too few or many pieces.
            KilohiveError: what the sender said, or that it is gone.
        """
        inbox = caller.inbox
        start = self._start(await inbox.receive())
        _, steps_R = counters_of(start, self.partial.n_rows, with_work=False)
        incoming = Incoming(self.partial.slots, "fp32", self._config.dtype, self.partial.taken)
        async with caller.saying_alive() if start.listens else nullcontext():
            while not incoming.done and (raw := await inbox.receive_or_end()) is not None:
                slot = await asyncio.to_thread(self._take, incoming, raw)
                self.partial.took(slot, self._sender)
                if tell:
                    tell(inbox.n_bytes)
        await caller.done()
        if incoming.done and (raw := await inbox.receive_or_end()) is not None:
            self._take(incoming, raw)  # which refuses it
        return await asyncio.to_thread(self._state, steps_R, start.version)

    def _start(self, raw: bytes) -> pb.Start:
        message = unpack(raw, START_BYTES + START_BYTES_PER_ROW * self.partial.n_rows)
        require(message, "start")
        start, partial = message.start, self.partial
        if start.block != str(partial.block_id):
            raise InvalidInputError("block", f"is {start.block[:40]!r}, must be {str(partial.block_id)!r}")
        if start.first_piece == 0:
            # A peer of an older release sends everything.
            partial.clear()
        elif start.first_piece != partial.taken:
            raise InvalidInputError("first_piece", f"is {start.first_piece}, must be {partial.taken} as was asked")
        return start

    def _take(self, incoming: Incoming, raw: bytes) -> Slot:
        message = unpack(raw, MAX_PIECE_MESSAGE_BYTES)
        require(message, "piece")
        slot, values_V = incoming.take(message.piece)
        slot.of(self.partial.store.flat).copy_(values_V)
        return slot

    def _state(self, steps_R: torch.Tensor, version: int) -> ReplicaState:
        partial = self.partial
        if partial.taken != len(partial.slots):
            came, due = partial.taken, len(partial.slots)
            raise InvalidInputError("pieces", f"{came} of block {partial.block_id} came, must be {due}")
        state = ReplicaState(
            params=partial.store.group("params"),
            first=partial.store.group("first"),
            second=partial.store.group("second"),
            steps_R=steps_R,
            learnt_R=torch.zeros(partial.n_rows, dtype=torch.float64),
            version=version,
        )
        checked_moments(state.first, state.second, self._config.limits(partial.block_id))
        return state


def _packed(slot: Slot, flat: dict[str, torch.Tensor], config: ExchangeConfig) -> bytes:
    return piece_message(slot, slot.of(flat), config.dtype).SerializeToString()

"""A replica's whole state from one peer to another, piece by piece, without loss. Both sides."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import torch

from common.errors import InvalidInputError
from node.averaging.exchange import START_BYTES, START_BYTES_PER_ROW, counters_of
from node.averaging.gossip import checked_moments
from node.averaging.messages import MAX_PIECE_MESSAGE_BYTES, require, unpack
from node.averaging.pieces import PARAMS, Incoming, TensorBuffers, cut, flattened, piece_message
from node.model.replica_state import ReplicaState, schema
from protocol import averaging_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.averaging.exchange import ExchangeConfig
    from node.averaging.pieces import Slot
    from node.model.replica_state import TensorSchema
    from node.rpc.message_stream import Inbox, Wire
    from protocol.manifest import BlockId


async def send_state(
    wire: Wire, block_id: BlockId, state: ReplicaState, config: ExchangeConfig, *, params_only: bool
) -> None:
    """Send a copy of a replica; raises what the stream's `send` does."""
    start = pb.Start(block=str(block_id), version=state.version, steps=state.steps_R.tolist())
    await wire.send(pb.ExchangeMessage(start=start).SerializeToString())
    flat = await asyncio.to_thread(flattened, state.named())
    for slot in cut(_wanted(schema(state), params_only=params_only)):
        await wire.send(await asyncio.to_thread(_packed, slot, flat, config))


class Download:
    """A replica's state as it arrives: `wanted` alone says what is allocated and what may come."""

    def __init__(
        self, block_id: BlockId, wanted: Sequence[TensorSchema], config: ExchangeConfig, *, params_only: bool
    ) -> None:
        tensors = _wanted(wanted, params_only=params_only)
        self._block_id, self._config = block_id, config
        self._n_rows = wanted[0].shape[0]
        self._store = TensorBuffers(tensors)
        self._incoming = Incoming(cut(tensors), "fp32", config.dtype)

    async def receive(self, inbox: Inbox, tell: Callable[[int], None] | None) -> ReplicaState:
        """The whole state; `tell` is called with the bytes that have come so far.

        Raises:
            InvalidInputError: a piece that is not the one due, moments out of range, or too few or many pieces.
            KilohiveError: what the sender said, or that it is gone.
        """
        message = unpack(await inbox.receive(), START_BYTES + START_BYTES_PER_ROW * self._n_rows)
        require(message, "start")
        if message.start.block != str(self._block_id):
            raise InvalidInputError("block", f"is {message.start.block[:40]!r}, must be {str(self._block_id)!r}")
        _, steps_R = counters_of(message.start, self._n_rows, with_work=False)
        while (raw := await inbox.receive_or_end()) is not None:
            await asyncio.to_thread(self._take, raw)
            if tell:
                tell(inbox.n_bytes)
        return await asyncio.to_thread(self._state, steps_R, message.start.version)

    def _take(self, raw: bytes) -> None:
        message = unpack(raw, MAX_PIECE_MESSAGE_BYTES)
        require(message, "piece")
        slot, values_V = self._incoming.take(message.piece)
        slot.of(self._store.flat).copy_(values_V)

    def _state(self, steps_R: torch.Tensor, version: int) -> ReplicaState:
        if not self._incoming.done:
            came, due = self._incoming.taken, len(self._incoming.slots)
            raise InvalidInputError("pieces", f"{came} of block {self._block_id} came, must be {due}")
        state = ReplicaState(
            params=self._store.group("params"),
            first=self._store.group("first"),
            second=self._store.group("second"),
            steps_R=steps_R,
            learnt_R=torch.zeros(self._n_rows, dtype=torch.float64),
            version=version,
        )
        checked_moments(state.first, state.second, self._config.limits(self._block_id))
        return state


def _wanted(tensors: Sequence[TensorSchema], *, params_only: bool) -> list[TensorSchema]:
    return [t for t in sorted(tensors) if t.name.startswith(PARAMS) or not params_only]


def _packed(slot: Slot, flat: dict[str, torch.Tensor], config: ExchangeConfig) -> bytes:
    return piece_message(slot, slot.of(flat), config.dtype).SerializeToString()

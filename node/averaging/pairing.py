"""A whole exchange of a pair over one stream: who offers what, then block by block, and what came of it.

An exchange that breaks keeps the blocks that it finished; the one it broke at is told with its reason, and the rest can
be offered again at once.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from common.errors import InvalidInputError, KilohiveError, LimitExceededError, NotHostedError, UnknownRunError
from common.tasks import within
from node.averaging.exchange import (
    START_BYTES,
    START_BYTES_PER_ROW,
    AnsweringSide,
    BlockResult,
    DialledSide,
    ExchangeResult,
    Side,
    answer_block,
    dial_block,
    settled,
)
from node.averaging.messages import MAX_OFFER_MESSAGE_BYTES, require, unpack
from node.averaging.replica_set import Claim
from node.model.replica_state import ReplicaState
from protocol import averaging_pb2 as pb
from protocol.limits import MAX_EXPERTS_PER_LAYER, MAX_OFFERED_BLOCKS, MAX_PEER_ID_CHARS
from protocol.manifest import parse_block_id
from protocol.version import PROTOCOL_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from node.averaging.exchange import ExchangeConfig
    from node.averaging.replica import AveragedReplica
    from node.averaging.replica_set import ReplicaSet
    from node.rpc.message_stream import Wire
    from protocol.manifest import BlockId

S = TypeVar("S", bound=Side)

MAX_START_BYTES = START_BYTES + START_BYTES_PER_ROW * MAX_EXPERTS_PER_LAYER

BUSY_HERE = "in another exchange here"
BUSY_THERE = "in another exchange there"
GONE_HERE = "no longer hosted here"
SLOW_HERE = "too slow at the rate that this node's owner allows"
_REASONS = {
    pb.NOT_HERE: "not hosted there",
    pb.BUSY: BUSY_THERE,
    pb.SLOW: "too slow at the rate that its owner allows there",
    pb.SCHEMA: "its tensors there are of other names, shapes or types",
}


@dataclass(kw_only=True)
class Tally:
    """How far an exchange has come; `agreed` once the answer to the offer is known."""

    partner: str
    dialled: bool
    agreed: bool = False
    moved: list[BlockResult] = field(default_factory=list)
    refused: dict[BlockId, str] = field(default_factory=dict)
    problem: str = ""

    def result(self, n_bytes: int, seconds: float) -> ExchangeResult:
        """The tally as it stands."""
        return ExchangeResult(
            partner=self.partner,
            dialled=self.dialled,
            blocks=tuple(self.moved),
            refused=dict(self.refused),
            n_bytes=n_bytes,
            seconds=seconds,
            problem=self.problem,
            busy=frozenset(block for block, why in self.refused.items() if why in {BUSY_HERE, BUSY_THERE}),
        )


async def receive_offer(wire: Wire, config: ExchangeConfig) -> bytes | None:
    """The dialler's first message, unchecked; None if it closes its side without one. DeadlineError if it is late."""
    async with within(config.offer_timeout_s, "the offer"):
        return await wire.receive_or_end()


class Pairing:
    """One exchange, from either side. `tally` is true at any moment, also after an error."""

    def __init__(self, wire: Wire, replicas: ReplicaSet, config: ExchangeConfig, tally: Tally) -> None:
        self.tally = tally
        self._wire, self._replicas, self._config = wire, replicas, config

    async def dial(self, block_ids: Sequence[BlockId]) -> None:
        """Exchange these blocks, in this order, with the peer that answers; returns without a word if none is free.

        Raises:
            KilohiveError: what broke the exchange; before `tally.agreed`, nothing has happened to any block.
        """
        claim = Claim(dialler=self._config.peer_id, pending=True)
        try:
            offer = await self._offer(block_ids, claim)
            if not offer.blocks:
                return
            async with within(self._config.offer_timeout_s, "the answer to an offer"):
                await self._wire.send(pb.ExchangeMessage(offer=offer).SerializeToString())
                accepted = self._accepted(offer, await self._wire.receive())
            claim.pending, self.tally.agreed = False, True
            for block_id in self.tally.refused:
                self._replicas.release(block_id, claim)
            for block_id in accepted:
                await self._dial_block(block_id, claim)
        finally:
            self._replicas.release_all(claim)

    async def answer(self, raw_offer: bytes, caller: str | None = None) -> None:
        """Answer the peer that dialled with this offer, until it closes its side; raises like `dial`.

        `caller`: peer id that has signed the call, None where calls are not signed.
        """
        config = self._config
        offer = checked_offer(raw_offer, config)
        if offer.peer_id == config.peer_id:
            raise InvalidInputError("peer_id", "is this node's own")
        if caller is not None and offer.peer_id != caller:
            raise InvalidInputError("peer_id", f"is {offer.peer_id!r}, but {caller} has signed the call")
        self.tally.partner = offer.peer_id
        claim = Claim(dialler=offer.peer_id, pending=False)
        try:
            answer = await self._answer_to(offer, claim)
            # Before it is sent: a dialler that breaks off as soon as it has it may cancel this very send.
            self.tally.agreed = True
            async with within(config.offer_timeout_s, "the answer to an offer"):
                await self._wire.send(pb.ExchangeMessage(offer=answer).SerializeToString())
            left = [parse_block_id(b.block) for b in answer.blocks if b.reason == pb.ACCEPTED]
            await self._answer_blocks(left, claim)
        finally:
            self._replicas.release_all(claim)

    async def _offer(self, block_ids: Sequence[BlockId], claim: Claim) -> pb.Offer:
        offer = self._empty_offer()
        wanted = list(dict.fromkeys(block_ids))[:MAX_OFFERED_BLOCKS]
        hashes = await self._schema_hashes(wanted)
        for block_id in wanted:
            replica = self._replicas.get(block_id)
            if replica is None or not hashes[block_id]:
                self.tally.refused[block_id] = GONE_HERE
                continue
            if self._is_slow(block_id):
                self.tally.refused[block_id] = SLOW_HERE
                continue
            if not self._replicas.claim(block_id, claim):
                self.tally.refused[block_id] = BUSY_HERE
                continue
            offer.blocks.add(block=str(block_id), schema=hashes[block_id], version=replica.version)
        return offer

    def _accepted(self, offer: pb.Offer, raw: bytes) -> list[BlockId]:
        """Blocks that the partner accepts, in order; the others are told in the tally."""
        answer = checked_offer(raw, self._config)
        if answer.peer_id != self.tally.partner:
            raise InvalidInputError("peer_id", f"is {answer.peer_id!r}, must be {self.tally.partner!r}")
        if [b.block for b in answer.blocks] != [b.block for b in offer.blocks]:
            raise InvalidInputError("blocks", "of the answer are not those of the offer")
        accepted = []
        for block in answer.blocks:
            if block.reason == pb.ACCEPTED:
                accepted.append(parse_block_id(block.block))
            else:
                reason = _REASONS.get(block.reason, f"refused there for reason {int(block.reason)}")
                self.tally.refused[parse_block_id(block.block)] = reason
        return accepted

    async def _answer_to(self, offer: pb.Offer, claim: Claim) -> pb.Offer:
        answer = self._empty_offer()
        offered = {parse_block_id(block.block): block.schema for block in offer.blocks}
        hashes = await self._schema_hashes(offered)
        for block_id, schema_hash in offered.items():
            replica = self._replicas.get(block_id)
            if replica is None or not hashes[block_id]:
                answer.blocks.add(block=str(block_id), reason=pb.NOT_HERE)
                continue
            reason = pb.SCHEMA
            if self._is_slow(block_id):
                reason = pb.SLOW
            elif schema_hash == hashes[block_id]:
                reason = pb.ACCEPTED if self._replicas.claim(block_id, claim) else pb.BUSY
            answer.blocks.add(block=str(block_id), schema=hashes[block_id], version=replica.version, reason=reason)
        return answer

    def _is_slow(self, block_id: BlockId) -> bool:
        return self._replicas.n_bytes(block_id) > self._config.max_block_bytes

    async def _dial_block(self, block_id: BlockId, claim: Claim) -> None:
        replica = self._replicas.get(block_id)
        # While the offer was on its way, an exchange that goes before ours may have taken the block.
        if replica is None or not self._replicas.claim(block_id, claim):
            self.tally.refused[block_id] = BUSY_HERE if replica else GONE_HERE
            return
        try:
            due = self._replicas.moments_due(block_id, self.tally.partner)
            side = await self._side(DialledSide, replica, weights_only=not due)
        except NotHostedError:
            self.tally.refused[block_id] = GONE_HERE
            return
        with self._blamed(block_id):
            result = await dial_block(self._wire, replica, side)
        self._finished(replica, side, result, claim)

    async def _answer_blocks(self, left: list[BlockId], claim: Claim) -> None:
        while True:
            async with within(self._config.offer_timeout_s, "the next block"):
                raw = await self._wire.receive_or_end()
            if raw is None:
                return
            message = unpack(raw, MAX_START_BYTES)
            require(message, "start")
            await self._answer_block(self._next_block(message.start.block, left, claim), message.start, claim)

    async def _answer_block(self, block_id: BlockId, start: pb.Start, claim: Claim) -> None:
        replica = self._replicas.get(block_id)
        if replica is None:
            raise NotHostedError("block", f"{block_id} is no longer hosted here")
        side = await self._side(AnsweringSide, replica, weights_only=start.weights_only)
        with self._blamed(block_id):
            result = await answer_block(self._wire, replica, side, start)
        self._finished(replica, side, result, claim)
        async with within(self._config.offer_timeout_s, "the end of a block"):
            await self._wire.send(settled(side))

    def _next_block(self, name: str, left: list[BlockId], claim: Claim) -> BlockId:
        """The block that the dialler begins; those that it has left out are free again."""
        names = [str(block_id) for block_id in left]
        if name not in names:
            raise InvalidInputError("block", f"is {name[:40]!r}, which is not among those still due")
        at = names.index(name)
        for skipped in left[:at]:
            self._replicas.release(skipped, claim)
        block_id = left[at]
        del left[: at + 1]
        return block_id

    async def _side(self, kind: type[S], replica: AveragedReplica, *, weights_only: bool) -> S:
        before_R = self._replicas.learnt_before(replica.id, self.tally.partner)
        copy = ReplicaState.copy_weights if weights_only else ReplicaState.copy
        async with within(self._config.block_timeout_s, f"the copy of block {replica.id}"):
            own = await self._wire.while_alive(asyncio.wrap_future(replica.look(copy)))
        made = asyncio.to_thread(kind, replica.id, own, before_R, self._config, weights_only=weights_only)
        return await self._wire.while_alive(made)

    def _finished(self, replica: AveragedReplica, side: Side, result: BlockResult, claim: Claim) -> None:
        self._replicas.exchanged(replica, self.tally.partner, side.own.learnt_R, weights_only=side.weights_only)
        moved = self._replicas.moved(replica.id, result.divergence)
        self._replicas.release(replica.id, claim)
        self.tally.moved.append(replace(result, moved=moved))

    @contextmanager
    def _blamed(self, block_id: BlockId) -> Iterator[None]:
        """Tell at which block the exchange broke: it must not come first again next time."""
        try:
            yield
        except KilohiveError as error:
            self.tally.refused[block_id] = str(error)
            raise

    async def _schema_hashes(self, block_ids: Iterable[BlockId]) -> dict[BlockId, bytes]:
        async with within(self._config.offer_timeout_s, "the schemas of the blocks"):
            return await self._wire.while_alive(self._replicas.schema_hashes(block_ids))

    def _empty_offer(self) -> pb.Offer:
        config = self._config
        return pb.Offer(protocol_version=PROTOCOL_VERSION, run_id=config.run_id, peer_id=config.peer_id)


def checked_offer(raw: bytes, config: ExchangeConfig) -> pb.Offer:
    """A peer's Offer of this run and protocol, its blocks named once each; raises InvalidInputError."""
    message = unpack(raw, MAX_OFFER_MESSAGE_BYTES)
    require(message, "offer")
    offer = message.offer
    if offer.protocol_version != PROTOCOL_VERSION:
        raise InvalidInputError("protocol_version", f"is {offer.protocol_version}, this node speaks {PROTOCOL_VERSION}")
    if offer.run_id != config.run_id:
        raise UnknownRunError("run_id", f"is {offer.run_id[:100]!r}, this node serves {config.run_id!r}")
    if not 0 < len(offer.peer_id) <= MAX_PEER_ID_CHARS or not offer.peer_id.isprintable():
        raise InvalidInputError("peer_id", f"must be 1 to {MAX_PEER_ID_CHARS} printable characters")
    if len(offer.blocks) > MAX_OFFERED_BLOCKS:
        raise LimitExceededError("blocks", len(offer.blocks), MAX_OFFERED_BLOCKS)
    _check_names([block.block for block in offer.blocks])
    return offer


def _check_names(names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise InvalidInputError("blocks", "names a block twice")
    for name in names:
        try:
            parse_block_id(name)
        except ValueError as error:
            raise InvalidInputError("blocks", str(error)) from None

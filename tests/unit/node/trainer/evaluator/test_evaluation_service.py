"""What a trainer's service takes of those who offer, and what it tells them."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import InvalidInputError, OverloadedError, UnavailableError, UnknownRequestError, UnknownRunError
from node.model.expert_file import expert_file
from node.rpc.upload import begin_of, file_messages
from node.trainer.evaluator.evaluation_service import MAX_UPLOADS, EvaluationService
from node.trainer.evaluator.offers import MAX_WAITING, OfferQueue
from protocol import contribution_pb2 as pb
from protocol.call_signature import CallSigner
from protocol.identity import Identity
from protocol.verdict import Offered
from tests.support.offers import Call, MemoryStream, peer, weights
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable

OWNER, TRAINER = Identity.generate(), Identity.generate()
MANIFEST = small_manifest(dtype="fp64", codec="fp64", owner=OWNER.peer_id)
DATA = expert_file(weights(), {})
PATH = "/kilohive.v1.Evaluation/Offer"


def offered_as(data: bytes = DATA, layer: int = 1, expert: int = 3) -> Offered:
    return Offered(run_id=MANIFEST.run_id, layer=layer, expert=expert, sha256=hashlib.sha256(data).digest())


class Trainer:
    """A service and its queue."""

    def __init__(self) -> None:
        self.evaluators: tuple[str, ...] = (TRAINER.peer_id,)
        self.queue = OfferQueue(lambda: 0.0)
        self.service = EvaluationService(MANIFEST, TRAINER.peer_id, self.queue, self.peers)

    def peers(self) -> Any:
        return (peer(OWNER.peer_id, "coordinator", evaluators=self.evaluators),)

    async def offer(self, caller: Identity, data: bytes = DATA, messages: Iterable[bytes] | None = None) -> Any:
        if messages is None:
            messages = file_messages(begin_of(offered_as(data), data), data)
        stream: Any = MemoryStream(messages)
        return await self.service._offer(stream, call_of(caller))

    async def ask(self, caller: Identity, **changes: Any) -> pb.OfferStatus:
        known = offered_as()
        fields = {"run_id": known.run_id, "layer": known.layer, "expert": known.expert, "sha256": known.sha256}
        return await self.service._ask(pb.AskRequest(**{**fields, **changes}), call_of(caller))


def call_of(caller: Identity) -> Any:
    return Call(CallSigner(caller).metadata(TRAINER.peer_id, PATH))


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def caller() -> Identity:
    return Identity.generate()


async def test_an_offer_waits_with_its_weights_and_its_peer_is_told_how_far_it_is(
    trainer: Trainer, caller: Identity
) -> None:
    first = await trainer.offer(caller)
    assert first.state == pb.WAITING
    waiting = trainer.queue.next()
    assert waiting is not None
    assert waiting.caller == caller.peer_id
    assert all(torch.equal(waiting.weights[name], w) for name, w in weights().items())
    second = await trainer.offer(Identity.generate())
    assert second.ahead == 1
    waiting.settle(pb.REFUSED, "no gain was found")
    assert (await trainer.ask(caller)).why == "no gain was found"


async def test_the_same_offer_again_costs_no_second_try(trainer: Trainer, caller: Identity) -> None:
    await trainer.offer(caller)
    again = MemoryStream(file_messages(begin_of(offered_as(), DATA), DATA))
    answer = await trainer.service._offer(again, call_of(caller))  # type: ignore[arg-type]
    assert (answer.state, answer.ahead, again.read) == (pb.WAITING, 0, 1)


async def test_one_of_each_peer_and_eight_in_all_are_let_in_before_a_piece_is_read(trainer: Trainer) -> None:
    peers = [Identity.generate() for _ in range(MAX_WAITING)]
    for one in peers:
        await trainer.offer(one)
    for late, data in ((peers[0], expert_file(weights(9), {})), (Identity.generate(), DATA)):
        stream: Any = MemoryStream(file_messages(begin_of(offered_as(data), data), data))
        with pytest.raises(OverloadedError):
            await trainer.service._offer(stream, call_of(late))
        assert stream.read == 1


async def test_another_peers_offer_is_not_told_of(trainer: Trainer, caller: Identity) -> None:
    await trainer.offer(caller)
    with pytest.raises(UnknownRequestError, match="offer it again"):
        await trainer.ask(Identity.generate())


async def test_a_trainer_that_the_owner_does_not_name_takes_no_offers(trainer: Trainer, caller: Identity) -> None:
    for trainer.evaluators in ((), (OWNER.peer_id,)):
        with pytest.raises(UnavailableError, match="the run's owner does not name it now"):
            await trainer.offer(caller)


async def test_another_run_place_or_length_is_refused_by_field(trainer: Trainer, caller: Identity) -> None:
    for changes, error, problem in (
        ({"run_id": "other"}, UnknownRunError, "run_id"),
        ({"layer": 2}, InvalidInputError, "2 layers of 16 experts"),
        ({"expert": 16}, InvalidInputError, "2 layers of 16 experts"),
        ({"n_bytes": 1 << 31}, InvalidInputError, "file bytes: is 2147483648, but the limit is 6152"),
        ({"sha256": b""}, InvalidInputError, "sha256: has 0 bytes"),
    ):
        begin = begin_of(offered_as(), DATA)
        for name, value in changes.items():
            setattr(begin, name, value)
        with pytest.raises(error, match=problem):
            await trainer.offer(caller, messages=file_messages(begin, DATA))
        if "n_bytes" not in changes:
            with pytest.raises(error, match=problem):
                await trainer.ask(caller, **changes)
    assert trainer.queue.next() is None


async def test_a_file_that_is_no_expert_of_the_run_is_refused_by_field_and_the_next_is_taken(
    trainer: Trainer, caller: Identity
) -> None:
    bad = weights(w_out=torch.full((8, 16), torch.nan, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match=r"file\.w_out: holds a number that is not finite"):
        await trainer.offer(caller, expert_file(bad, {}))
    assert trainer.queue.next() is None
    await trainer.offer(caller)


async def test_who_breaks_off_or_holds_uploads_open_is_one_of_two_and_makes_room_when_he_ends(
    trainer: Trainer, caller: Identity
) -> None:
    class Silent(MemoryStream):
        async def receive(self) -> bytes | None:
            await asyncio.Event().wait()
            return None

    held: list[asyncio.Task[Any]] = []
    for _ in range(MAX_UPLOADS):
        stream: Any = Silent(())
        held.append(asyncio.create_task(trainer.service._offer(stream, call_of(Identity.generate()))))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="already receives 2 offers"):
        await trainer.offer(caller)
    for task in held:
        task.cancel()  # as gRPC does when a caller has gone
    await asyncio.gather(*held, return_exceptions=True)
    with pytest.raises(UnavailableError, match="closed the stream"):
        await trainer.offer(caller, messages=[])
    with pytest.raises(InvalidInputError, match="file bytes: are 0, announced were"):
        await trainer.offer(caller, messages=list(file_messages(begin_of(offered_as(), DATA), DATA))[:1])
    assert (await trainer.offer(caller)).state == pb.WAITING

"""What a host takes an expert in on, and what it does not: every lie of who brings one, field by field."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import InvalidInputError, KilohiveError, NotHostedError, UnavailableError, UnknownRunError
from common.events import EventLog
from node.host.expert_upload_service import ExpertUploadService, VerdictChecker
from node.host.serving.runtime import Runtime, RuntimeConfig
from node.limits.rate_limits import RateLimits
from node.model.expert_file import ExpertId, expert_file
from node.model.experts.block import new_block
from node.rpc.upload import begin_of, file_messages
from protocol import contribution_pb2 as pb
from protocol.identity import Identity
from protocol.limits import MAX_PIECE_BYTES
from protocol.manifest import AveragingConfig, BlockId
from protocol.verdict import VERDICT_TTL_S, Offered, Verdict, sign_verdict
from tests.support.events import written_to
from tests.support.offers import SHAPES, Call, MemoryStream, peer, weights
from tests.support.swarm_parts import CPU, small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dht.view import PeerInfo
    from node.model.experts.block import Block

NOW_S, BEGAN_S = 1_800_000_000.0, 1_799_999_000.0
OWNER, EVALUATOR, OTHER = (Identity.generate() for _ in range(3))
MANIFEST = small_manifest(dtype="fp64", codec="fp64", owner=OWNER.peer_id, averaging=AveragingConfig(max_staleness=10))
PLACE, BLOCK = ExpertId(1, 6), BlockId(1, 1)
DATA = expert_file(weights(7), {})
VERSION = 40


@dataclass
class Host:
    """An intake over a real runtime with one block."""

    runtime: Runtime
    now_s: float = NOW_S
    coordinator: str = OWNER.peer_id
    evaluators: tuple[str, ...] = (EVALUATOR.peer_id,)
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        log = EventLog()
        log.subscribe(written_to(self.events))
        checker = VerdictChecker(MANIFEST.owner, self.peers, BEGAN_S, clock=lambda: self.now_s)
        self.service = ExpertUploadService(MANIFEST, self.runtime, checker, RateLimits(), log)

    def peers(self) -> tuple[PeerInfo, ...]:
        return (peer(self.coordinator, "coordinator", evaluators=self.evaluators),)

    @property
    def block(self) -> Block:
        return self.runtime.blocks[BLOCK]

    def expert(self, place: ExpertId = PLACE) -> dict[str, torch.Tensor]:
        return {name: p[place.row(MANIFEST.model)].clone() for name, p in self.block.params.items()}

    async def take_in(
        self, *verdicts: pb.SignedVerdict, data: bytes = DATA, offered: Offered | None = None, **changes: Any
    ) -> pb.TakeInResponse:
        begin = begin_of(offered or offered_as(data), data)
        begin.verdicts.extend(verdicts)
        for name, value in changes.items():
            setattr(begin, name, value)
        return await self.send(MemoryStream(file_messages(begin, data)))

    async def send(self, stream: Any) -> pb.TakeInResponse:
        call: Any = Call()
        return await self.service._take_in(stream, call)


@contextmanager
def hosting() -> Iterator[Host]:
    block = new_block(MANIFEST, BLOCK, CPU)
    block.version = VERSION
    block.adam.steps_E += 5
    for moments in (*block.adam.first.values(), *block.adam.second.values()):
        moments.fill_(0.25)
    runtime = Runtime([block], MANIFEST, RuntimeConfig())
    runtime.start()
    try:
        yield Host(runtime)
    finally:
        runtime.stop(5)


def offered_as(data: bytes = DATA, place: ExpertId = PLACE) -> Offered:
    sha256 = hashlib.sha256(data).digest()
    return Offered(run_id=MANIFEST.run_id, layer=place.layer, expert=place.expert, sha256=sha256)


def verdict(by: Identity = EVALUATOR, data: bytes = DATA, **changes: Any) -> pb.SignedVerdict:
    said = Verdict(offered=offered_as(data), version=VERSION, n_windows=99, low=1e-3, high=2e-3, issued_s=NOW_S - 5)
    return sign_verdict(by, replace(said, **changes))


async def test_an_expert_is_taken_in_on_the_word_of_the_owners_evaluator_and_the_rest_of_its_block_stays() -> None:
    with hosting() as host:
        before = {name: p.clone() for name, p in host.block.params.items()}
        answer = await host.take_in(verdict())
        assert answer.version == host.block.version == VERSION + 1
        assert all(torch.equal(host.expert()[name], w) for name, w in weights(7).items())
        row = PLACE.row(MANIFEST.model)
        others = [other for other in range(4) if other != row]
        for name, p in host.block.params.items():
            assert torch.equal(p[others], before[name][others])
            for moments in (host.block.adam.first[name], host.block.adam.second[name]):
                assert bool((moments[row] == 0).all())
                assert bool((moments[others] == 0.25).all())
        assert host.block.adam.steps_E.tolist() == [0 if other == row else 5 for other in range(4)]
        (told,) = host.events
        assert (told["event"], told["layer"], told["expert"], told["tested"]) == ("taken_in", 1, 6, VERSION)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nobody's word": ({"verdicts": ()}, "verdicts: are 0, must be 1"),
    "too many": ({"verdicts": (verdict(), verdict())}, "verdicts: are 2, must be 1"),
    "a stranger's word": ({"verdicts": (verdict(Identity.generate()),)}, "do not count"),
    "the owner's own": ({"verdicts": (verdict(OWNER),)}, "do not count"),
    "a word that lapsed": ({"verdicts": (verdict(issued_s=NOW_S - VERDICT_TTL_S - 1),)}, r"verdict\.issued_s"),
    "a word of tomorrow": ({"verdicts": (verdict(issued_s=NOW_S + 86_400),)}, r"verdict\.issued_s"),
    "another file's word": ({"verdicts": (verdict(data=expert_file(weights(8), {})),)}, "another file, place or run"),
    "another place's word": ({"verdicts": (verdict(offered=offered_as(place=ExpertId(1, 5))),)}, "another file, place"),
    "another run's word": ({"verdicts": (verdict(offered=replace(offered_as(), run_id="x")),)}, "another file, place"),
    "a stale word": ({"verdicts": (verdict(version=VERSION - 13),)}, "is 27, 1/1 is at 40: stale, at most 12 steps"),
    "a word from ahead": ({"verdicts": (verdict(version=VERSION + 13),)}, "is 53, 1/1 is at 40: stale"),
    "a file too long": ({"n_bytes": 1 << 30}, "file bytes: is 1073741824, but the limit is"),
    "no such layer": ({"layer": 2}, "2 layers of 16 experts"),
    "no such expert": ({"expert": 1 << 31}, "2 layers of 16 experts"),
    "a hash that is none": ({"sha256": b"x"}, "sha256: has 1 bytes"),
}


async def test_what_does_not_hold_is_refused_by_field_before_a_piece_is_read() -> None:
    with hosting() as host:
        before = host.expert()
        for name, (changes, problem) in REFUSED.items():
            begin = begin_of(offered_as(), DATA)
            begin.verdicts.extend(changes.get("verdicts", (verdict(),)))
            for field_name in changes.keys() - {"verdicts"}:
                setattr(begin, field_name, changes[field_name])
            stream = MemoryStream(file_messages(begin, DATA))
            with pytest.raises(InvalidInputError, match=problem):
                await host.send(stream)
            assert (stream.read, host.block.version, host.events) == (1, VERSION, []), name
        assert all(torch.equal(host.expert()[name], w) for name, w in before.items())


async def test_another_run_or_a_block_that_is_elsewhere_is_refused() -> None:
    with hosting() as host:
        with pytest.raises(UnknownRunError):
            await host.take_in(verdict(), run_id="other")
        elsewhere = offered_as(place=ExpertId(0, 6))
        with pytest.raises(NotHostedError, match="0/1 is not hosted here"):
            await host.take_in(verdict(offered=elsewhere), offered=elsewhere)


PIECES: dict[str, tuple[list[bytes], str]] = {
    "no file": ([], "file bytes: are 0"),
    "half a file": ([pb.OfferMessage(piece=DATA[:100]).SerializeToString()], "file bytes: are 100"),
    "more than was announced": ([pb.OfferMessage(piece=DATA + b"x").SerializeToString()], "piece: is empty, or more"),
    "an empty piece": ([pb.OfferMessage(begin=pb.OfferBegin()).SerializeToString()], "piece: is empty"),
    "another file": ([pb.OfferMessage(piece=bytes(len(DATA))).SerializeToString()], "sha256: is not that of the file"),
    "a piece too large": ([bytes(MAX_PIECE_BYTES + 17)], "message bytes"),
    "garbage": ([b"\xff\xff"], "not a whole"),
}


async def test_a_file_that_is_not_the_one_that_was_announced_is_refused_and_the_next_is_taken() -> None:
    begin = begin_of(offered_as(), DATA)
    begin.verdicts.append(verdict())
    with hosting() as host:
        for name, (messages, problem) in PIECES.items():
            with pytest.raises(InvalidInputError, match=problem):
                await host.send(MemoryStream([pb.OfferMessage(begin=begin).SerializeToString(), *messages]))
            assert host.block.version == VERSION, name
        await host.take_in(verdict())
        assert host.block.version == VERSION + 1


async def test_an_evaluator_that_lies_about_what_is_in_a_file_has_no_other_shapes_or_nan_taken_in() -> None:
    bad = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name, shape in SHAPES.items()}
    with hosting() as host:
        for data in (expert_file(bad, {}), expert_file({"w_in": torch.ones(1)}, {}), b"no tensors"):
            with pytest.raises(InvalidInputError, match="file"):
                await host.take_in(verdict(data=data), data=data)
        assert host.block.version == VERSION


async def test_what_does_not_begin_a_file_or_never_comes_is_refused() -> None:
    with hosting() as host:
        for messages in ([pb.OfferMessage(piece=b"x").SerializeToString()], [b"\xff"], [bytes(9999)], []):
            with pytest.raises(KilohiveError):
                await host.send(MemoryStream(messages))


async def test_a_word_acts_once_and_the_same_file_again_is_answered_without_effect() -> None:
    with hosting() as host:
        await host.take_in(verdict())
        taken = host.block.version
        row = PLACE.row(MANIFEST.model)
        host.runtime.call(lambda: host.block.params["w_in"][row].mul_(2.0)).result(5)  # it has learnt since
        learnt = host.expert()
        assert (await host.take_in(verdict())).version == taken
        assert all(torch.equal(host.expert()[name], w) for name, w in learnt.items())
        assert (host.block.version, len(host.events)) == (taken, 1)


async def test_of_two_offers_that_were_held_against_the_same_expert_the_first_is_taken() -> None:
    late = expert_file(weights(8), {})
    with hosting() as host:
        await host.take_in(verdict())
        with pytest.raises(InvalidInputError, match="another expert was taken in since"):
            await host.take_in(verdict(data=late), data=late)
        assert all(torch.equal(host.expert()[name], w) for name, w in weights(7).items())
        await host.take_in(verdict(data=late, version=host.block.version), data=late)
        assert all(torch.equal(host.expert()[name], w) for name, w in weights(8).items())


async def test_a_host_that_began_anew_does_not_act_on_what_was_signed_before() -> None:
    with hosting() as host:
        host.now_s = BEGAN_S + 10
        with pytest.raises(InvalidInputError, match="before this host began"):
            await host.take_in(verdict(issued_s=BEGAN_S - 1))


async def test_where_the_owner_names_two_both_must_have_signed() -> None:
    with hosting() as host:
        host.evaluators = (EVALUATOR.peer_id, OTHER.peer_id, Identity.generate().peer_id)
        for signed in ((verdict(),), (verdict(), verdict())):
            with pytest.raises(InvalidInputError, match="verdicts"):
                await host.take_in(*signed)
        with pytest.raises(InvalidInputError, match="stale"):
            await host.take_in(verdict(), verdict(OTHER, version=VERSION - 13))
        assert host.block.version == VERSION
        await host.take_in(verdict(), verdict(OTHER, version=VERSION - 3))
        assert host.block.version == VERSION + 1


async def test_while_the_owner_is_away_or_names_nobody_nothing_is_taken_in() -> None:
    with hosting() as host:
        host.evaluators = ()
        with pytest.raises(UnavailableError, match="names no evaluators now"):
            await host.take_in(verdict())
        host.coordinator, host.evaluators = OTHER.peer_id, (EVALUATOR.peer_id,)
        with pytest.raises(UnavailableError, match="names no evaluators now"):
            await host.take_in(verdict())
        assert host.block.version == VERSION

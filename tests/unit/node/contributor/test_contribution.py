"""A contributor's way from evaluators to hosts, whatever these do: begin anew, be full, refuse, lie, leave."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import (
    DeadlineError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
    UnknownRequestError,
)
from node.contributor import contribution as module
from node.contributor.contribution import Contribution, Outcome
from protocol import contribution_pb2 as pb
from protocol.identity import Identity
from protocol.manifest import BlockId
from protocol.verdict import Offered
from tests.support.offers import peer
from tests.support.swarm_parts import make_replica, small_manifest

if TYPE_CHECKING:
    from dht.view import PeerInfo, Replica
    from protocol.endpoints import Address

OWNER = Identity.generate()
MANIFEST = small_manifest(owner=OWNER.peer_id)
OFFERED = Offered(run_id=MANIFEST.run_id, layer=1, expert=6, sha256=bytes(32))
WAITING = pb.OfferStatus(state=pb.WAITING, ahead=2)
TRYING = pb.OfferStatus(state=pb.EVALUATING, n_windows=80, of_windows=1024, low=-1e-3, high=2e-3)
GAINED = pb.OfferStatus(
    state=pb.GAINED, n_windows=130, low=1e-3, high=2e-3, verdict=pb.SignedVerdict(verdict=b"as signed")
)
REFUSED = pb.OfferStatus(state=pb.REFUSED, n_windows=99, low=-2e-3, high=1e-5, why="no gain was found: \x1b[31mso")


class Swarm:
    """Trainers and hosts that say what the test lists, in turn; the last for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_evaluators: int = 1, n_hosts: int = 1) -> None:
        for name in ("ASK_EVERY_S", "RETRY_S"):
            monkeypatch.setattr(module, name, 1e-4)
        monkeypatch.setattr(module, "FIND_S", 1e-3)
        self.evaluators = tuple(f"evaluator-{number}" for number in range(n_evaluators))
        self.trainers = [peer(peer_id, "trainer") for peer_id in self.evaluators]
        self.hosts = [f"host-{number}" for number in range(n_hosts)]
        self.says: defaultdict[str, deque[Any]] = defaultdict(deque)
        self.calls: Counter[str] = Counter()
        self.delivered: list[tuple[str, list[bytes]]] = []
        self.told: list[str] = []

    def peers(self) -> tuple[PeerInfo, ...]:
        return (peer(OWNER.peer_id, "coordinator", evaluators=self.evaluators), *self.trainers)

    def replicas(self, block: BlockId) -> tuple[Replica, ...]:
        assert block == BlockId(1, 1)
        return tuple(make_replica(block, host, f"127.0.0.1:{4000 + n}") for n, host in enumerate(self.hosts))

    def _answer(self, kind: str, peer_id: str) -> Any:
        self.calls[kind] += 1
        script = self.says[f"{kind} {peer_id}"]
        said = script.popleft() if len(script) > 1 else script[0]
        if isinstance(said, Exception):
            raise said
        return said

    async def offer(self, trainer: Address, offered: Offered, data: bytes) -> pb.OfferStatus:
        assert (offered, data) == (OFFERED, b"file")
        answer: pb.OfferStatus = self._answer("offer", trainer.peer_id)
        return answer

    async def ask(self, trainer: Address, offered: Offered) -> pb.OfferStatus:
        answer: pb.OfferStatus = self._answer("ask", trainer.peer_id)
        return answer

    async def take_in(self, host: Address, offered: Offered, data: bytes, verdicts: Any) -> int:
        version: int = self._answer("take in", host.peer_id)
        self.delivered.append((host.peer_id, [verdict.verdict for verdict in verdicts]))
        return version

    async def run(self, timeout_s: float = 20.0) -> Outcome:
        parts: Any = self
        return await Contribution(MANIFEST, parts, parts, (OFFERED, b"file"), self.told.append).run(timeout_s)


def script(swarm: Swarm, **says: list[Any]) -> None:
    for name, answers in says.items():
        kind, _, who = name.rpartition("__")
        swarm.says[f"{kind.replace('_', ' ')} {who.replace('_', '-')}"].extend(answers)


async def test_an_expert_that_gains_is_brought_to_every_host_of_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(monkeypatch, n_hosts=2)
    script(swarm, offer__evaluator_0=[WAITING], ask__evaluator_0=[WAITING, TRYING, GAINED])
    script(swarm, take_in__host_0=[41], take_in__host_1=[43])
    outcome = await swarm.run()
    assert outcome == (
        True,
        "taken in by 2 of 2 hosts of block 1/1: it gains 0.001 to 0.002 nats per token over 130 held-out windows",
    )
    assert sorted(swarm.delivered) == [("host-0", [b"as signed"]), ("host-1", [b"as signed"])]
    assert any("waits behind 2 others" in words for words in swarm.told)
    assert any("80 of 1024 held-out windows, it gains -0.001 to 0.002" in words for words in swarm.told)


async def test_a_refusal_is_told_in_plain_words_and_no_host_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(monkeypatch)
    script(swarm, offer__evaluator_0=[REFUSED])
    outcome = await swarm.run()
    assert not outcome.taken_in
    assert outcome.words == (
        "not taken in: no gain was found: ?[31mso (it gains -0.002 to 1e-05 nats per token, 99 windows)"
    )
    assert swarm.calls == {"offer": 1}


async def test_where_there_are_two_evaluators_both_are_asked_and_one_refusal_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm = Swarm(monkeypatch, n_evaluators=2)
    script(swarm, offer__evaluator_0=[GAINED], offer__evaluator_1=[REFUSED], take_in__host_0=[9])
    assert not (await swarm.run()).taken_in
    assert swarm.delivered == []
    swarm.says["offer evaluator-1"] = deque([GAINED])
    assert (await swarm.run()).taken_in
    assert swarm.delivered == [("host-0", [b"as signed"] * 2)]


async def test_a_trainer_that_began_anew_is_offered_the_file_again(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(monkeypatch)
    script(swarm, offer__evaluator_0=[WAITING], take_in__host_0=[9])
    gone = [UnavailableError("cannot be reached"), DeadlineError("no answer"), UnknownRequestError("not known")]
    script(swarm, ask__evaluator_0=[TRYING, *gone, TRYING, GAINED])
    assert (await swarm.run()).taken_in
    assert swarm.calls["offer"] == 2
    assert any("does not answer" in words for words in swarm.told)


async def test_a_full_line_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(monkeypatch)
    full = OverloadedError("8 offers wait here, the limit is 8", 1e-4)
    script(swarm, offer__evaluator_0=[full, full, GAINED], take_in__host_0=[9])
    assert (await swarm.run()).taken_in
    assert any("8 offers wait here" in words for words in swarm.told)


async def test_a_host_that_is_busy_is_asked_again_and_one_that_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm = Swarm(monkeypatch, n_hosts=3)
    script(swarm, offer__evaluator_0=[GAINED])
    script(swarm, take_in__host_0=[OverloadedError("takes another expert in", 1e-4), 9])
    script(swarm, take_in__host_1=[InvalidInputError("verdict.version", "is 3: stale")])
    script(swarm, take_in__host_2=[UnavailableError("gone")])
    outcome = await swarm.run()
    assert outcome.taken_in
    assert outcome.words.startswith("taken in by 1 of 3 hosts")
    assert "host host-1 did not take it in: verdict.version: is 3: stale" in outcome.words
    assert "host host-2 did not take it in: gone" in outcome.words
    assert swarm.calls["take in"] == 2 + 1 + module.DELIVERIES


async def test_a_gain_that_no_host_takes_in_is_not_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(monkeypatch, n_hosts=0)
    script(swarm, offer__evaluator_0=[GAINED])
    outcome = await swarm.run()
    assert not outcome.taken_in
    assert outcome.words.endswith("held-out windows: no host of it is live")


async def test_a_run_whose_owner_names_nobody_or_whose_evaluators_are_down_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm = Swarm(monkeypatch, n_evaluators=2)
    del swarm.trainers[0]
    with pytest.raises(UnavailableError, match="1 of the run's evaluators are up, 2 are needed"):
        await swarm.run()
    swarm.evaluators = ()
    with pytest.raises(UnavailableError, match=r"takes no offers now: .*--evaluators"):
        await swarm.run()


async def test_who_waits_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(monkeypatch)
    script(swarm, offer__evaluator_0=[TRYING], ask__evaluator_0=[TRYING])
    with pytest.raises(DeadlineError, match=r"the contribution took longer than 0\.1 s"):
        await swarm.run(0.1)


async def test_an_offer_that_is_refused_by_field_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(monkeypatch)
    script(swarm, offer__evaluator_0=[InvalidInputError("file.w_in", "is not F32 of shape [16, 8]")])
    with pytest.raises(ExceptionGroup) as caught:
        await swarm.run()
    assert [str(error) for error in caught.value.exceptions] == ["file.w_in: is not F32 of shape [16, 8]"]


async def test_numbers_that_an_evaluator_makes_up_are_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(monkeypatch)
    odd = pb.OfferStatus(state=pb.REFUSED, n_windows=(1 << 32) - 1, low=math.nan, high=math.inf, why="\x1b[2J" * 999)
    script(swarm, offer__evaluator_0=[odd])
    outcome = await swarm.run()
    assert not outcome.taken_in
    assert outcome.words.isprintable()
    assert len(outcome.words) < 400

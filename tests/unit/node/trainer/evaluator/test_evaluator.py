"""A trainer that tries offers: it takes what gains, refuses what does not, and goes on training whatever comes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from common.errors import CheckpointError, DrainingError, TooFewExpertsError, UnavailableError
from common.events import EventLog
from node.data import open_dataset
from node.model.expert_file import ExpertId
from node.model.experts.state import block_state
from node.model.moe import LocalExperts
from node.trainer.evaluator import evaluator as evaluator_module
from node.trainer.evaluator.evaluator import Evaluator
from node.trainer.evaluator.held_out_trial import ALPHA, HeldOutTrial, config_of, refusal
from node.trainer.evaluator.offer_count import OfferCount
from node.trainer.evaluator.offers import FORGET_S, Offer, OfferQueue
from node.trainer.evaluator.sequential_test import Decision
from node.trainer.evaluator.trial_builder import TrialBuilder
from node.trainer.train_step import StepConfig, Training, build_transformer
from protocol import contribution_pb2 as pb
from protocol.identity import Identity
from protocol.manifest import AveragingConfig, BlockId
from protocol.verdict import Offered, open_verdict
from tests.support.events import written_to
from tests.support.offers import present, train_one, weights
from tests.support.swarm_parts import make_replica, small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dht.view import Replica
    from node.data import TextDataset
    from node.model.replica_state import ReplicaState
    from node.model.transformer import Transformer

MANIFEST = small_manifest(
    dtype="fp64",
    codec="fp64",
    model={"experts_per_layer": 4, "experts_per_block": 4},
    optimizer={"expert_lr": 1e-2},
    averaging=AveragingConfig(max_staleness=10),
)
PLACE = ExpertId(1, 2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Row {n}: the square of {n % 50} is {(n % 50) ** 2}." for n in range(2000)))
    return open_dataset(text, cache_dir=folder / "cache", seed=0)


@dataclass
class Trainer:
    """An evaluator over experts in this process, which it downloads as if from one host."""

    training: Training
    experts: LocalExperts
    out: Path
    now_s: float = 0.0
    version: int = 7
    """Of the block as its host announces it."""
    failure: Exception | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.identity, log = Identity.generate(), EventLog()
        log.subscribe(written_to(self.events))
        self.queue = OfferQueue(lambda: self.now_s)
        trials = TrialBuilder(self.training, self.experts, self, self.replicas)
        count = OfferCount(self.out, MANIFEST.run_id)
        self.evaluator = Evaluator(self.queue, trials, count, self.identity, log, clock=lambda: self.now_s)

    def replicas(self, block: BlockId) -> tuple[Replica, ...]:
        return (replace(make_replica(block, "host", "127.0.0.1:1"), version=self.version),)

    async def download(self, *_: object, **__: object) -> ReplicaState:
        self.now_s += 2.0
        if self.failure is not None:
            raise self.failure
        block = self.experts.blocks[PLACE.layer][0]
        state = block_state(block).copy()
        state.version = 7
        return state

    def offer(self, given: dict[str, torch.Tensor], caller: str = "peer") -> Offer:
        sha256 = len(self.events).to_bytes(32, "big")
        offered = Offered(run_id=MANIFEST.run_id, layer=PLACE.layer, expert=PLACE.expert, sha256=sha256)
        return self.queue.add(caller, offered, given)

    async def step(self, seconds: float = 1.0) -> None:
        await self.evaluator.after_step(seconds, asyncio.Event())

    async def tried(self, given: dict[str, torch.Tensor]) -> Offer:
        offer = self.offer(given)
        await self.step(1e9)
        assert not offer.is_open
        return offer


def small_model() -> tuple[LocalExperts, Transformer]:
    generator, experts = torch.Generator().manual_seed(1), LocalExperts(MANIFEST)
    return experts, build_transformer(MANIFEST, experts, generator)


@pytest.fixture(autouse=True)
def _one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the windows, which nobody can know otherwise."""
    monkeypatch.setattr("node.trainer.evaluator.held_out_trial.secrets.randbits", lambda _: 1)


@pytest.fixture
def trainer(dataset: TextDataset, tmp_path: Path) -> Iterator[Trainer]:
    experts, model = small_model()
    training = Training(MANIFEST, model, experts, dataset, StepConfig(batch=8, micro_batches=1), give_up)
    try:
        yield Trainer(training, experts, tmp_path)
    finally:
        training.close()


def give_up(error: TooFewExpertsError) -> None:
    raise error


@pytest.fixture(scope="module")
def better(dataset: TextDataset) -> dict[str, torch.Tensor]:
    """What 25 steps at home make of the expert."""
    experts, model = small_model()
    return train_one(experts, model.eval(), dataset, PLACE, 25)


async def test_an_expert_that_gains_is_signed_for(trainer: Trainer, better: dict[str, torch.Tensor]) -> None:
    offer = await trainer.tried(better)
    assert offer.state == pb.GAINED
    assert offer.verdict is not None
    signer, verdict = open_verdict(offer.verdict)
    assert (signer, verdict.offered, verdict.version) == (trainer.identity.peer_id, offer.offered, 7)
    assert verdict.low > 0
    assert 64 < verdict.n_windows < offer.of_windows
    (told,) = trainer.events
    assert (told["event"], told["state"], told["peer"]) == ("offer", "gained", "peer")


async def test_an_expert_that_does_not_gain_is_refused_and_told_why(
    trainer: Trainer, better: dict[str, torch.Tensor]
) -> None:
    now, generator = present(trainer.experts, PLACE), torch.Generator().manual_seed(3)
    offers = {
        "noise": {name: w + 1e-3 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in now.items()},
        "the same": now,
        "backwards": {name: 2 * w - better[name] for name, w in now.items()},
        "ruined": {name: 20 * (w - better[name]) for name, w in now.items()},
    }
    for kind, offered in offers.items():
        offer = await trainer.tried(offered)
        assert (offer.state, offer.verdict) == (pb.REFUSED, None), kind
        assert offer.why.startswith(("no gain was found", "it is worse"))
        assert trainer.events[-1]["why"] == offer.why


async def test_trying_an_offer_leaves_the_trunk_and_the_trainers_mode_alone(
    trainer: Trainer, better: dict[str, torch.Tensor]
) -> None:
    model = trainer.training.model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    await trainer.tried(better)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


async def test_no_more_than_a_tenth_of_the_time_goes_into_offers(trainer: Trainer) -> None:
    first, second = trainer.offer(weights(1)), trainer.offer(weights(2), "other")
    await trainer.step()  # 2 s of download by this clock, and nothing for the rest
    assert (first.is_open, second.is_open) == (False, True)
    for _ in range(17):
        await trainer.step(1.0)
    assert second.is_open, "18 s must be trained for the 2 s that the first took"
    await trainer.step(1.0)
    assert not second.is_open


async def test_each_further_offer_must_show_more_also_after_the_trainer_began_anew(trainer: Trainer) -> None:
    await trainer.tried(weights(1))
    await trainer.tried(weights(2))
    stored = json.loads((trainer.out / "offers.json").read_text())
    assert stored == {MANIFEST.run_id: 2}
    again = Trainer(trainer.training, trainer.experts, trainer.out)
    await again.tried(weights(3))
    assert json.loads((trainer.out / "offers.json").read_text()) == {MANIFEST.run_id: 3}
    alphas = [config_of(MANIFEST.model, number).alpha for number in range(1, 10_001)]
    assert alphas == sorted(alphas, reverse=True)
    assert 0.999 * ALPHA < sum(alphas) < ALPHA


async def test_a_count_that_cannot_be_read_is_told_at_the_start(trainer: Trainer) -> None:
    (trainer.out / "offers.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"offers\.json"):
        Trainer(trainer.training, trainer.experts, trainer.out)


async def test_a_block_that_trained_on_meanwhile_makes_an_offer_stale(
    trainer: Trainer, better: dict[str, torch.Tensor]
) -> None:
    trainer.version = 18
    offer = await trainer.tried(better)
    assert (offer.state, offer.verdict) == (pb.NOT_TESTED, None)
    assert "stale: block 1/0 took 11 steps meanwhile, the limit is 10" in offer.why


async def test_a_peer_that_has_left_costs_no_more_than_what_was_done_for_it(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = trainer.offer(weights(1))
    offer.asked_s = trainer.now_s - FORGET_S
    monkeypatch.setattr(OfferQueue, "_forget", lambda _: None)  # it leaves during the download, not before
    await trainer.step()
    assert offer.state == pb.NOT_TESTED
    assert "has not asked" in offer.why
    assert trainer.events[0]["windows"] == 0


async def test_a_long_evaluation_is_ended_and_the_offer_refused(
    trainer: Trainer, better: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator_module, "MAX_EVALUATION_S", 2.5)  # the download takes 2 of them
    real = HeldOutTrial.go_on

    def go_on(self: Any) -> Any:
        trainer.now_s += 1.0
        return real(self)

    monkeypatch.setattr(HeldOutTrial, "go_on", go_on)
    offer = await trainer.tried(better)
    assert offer.state == pb.REFUSED
    assert offer.why == "no gain was found in 8 held-out windows"


@pytest.mark.parametrize(
    "failure",
    [UnavailableError("no two of 2 replicas' weights are within 0.5 of each other"), RuntimeError("a bug")],
    ids=["no replica", "a bug of ours"],
)
async def test_what_goes_wrong_is_told_to_the_peer_and_the_next_offer_is_tried(
    trainer: Trainer, better: dict[str, torch.Tensor], failure: Exception
) -> None:
    trainer.failure = failure
    offer = await trainer.tried(weights(1))
    assert offer.state == pb.NOT_TESTED
    assert "it could not be tested" in offer.why
    assert "a bug" not in offer.why
    trainer.failure = None
    assert (await trainer.tried(better)).state == pb.GAINED


async def test_experts_that_do_not_answer_are_no_fault_of_the_offer(
    trainer: Trainer, better: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object, **__: object) -> Any:
        raise TooFewExpertsError("layer 0: fewer than 1 experts answered")

    with monkeypatch.context() as broken:
        broken.setattr(trainer.experts, "forward", forward)
        offer = await trainer.tried(better)
    assert (offer.state, offer.why) == (
        pb.NOT_TESTED,
        "it could not be tested: layer 0: fewer than 1 experts answered",
    )


async def test_a_trainer_that_is_stopped_leaves_its_offers(trainer: Trainer) -> None:
    offer, stop = trainer.offer(weights(1)), asyncio.Event()

    async def download(*_: object, **__: object) -> Any:
        stop.set()
        await asyncio.Event().wait()

    trainer.download = download  # type: ignore[method-assign]
    with pytest.raises(DrainingError):
        await trainer.evaluator.after_step(1.0, stop)
    assert offer.verdict is None


@pytest.mark.parametrize(
    ("verdict", "high", "words"),
    [
        ("reject", -1e-4, "it is worse than the present expert: because"),
        ("reject", 1e-6, "no gain was found: because"),
        ("undecided", 1e-3, "no gain was found in 99 held-out windows"),
    ],
)
def test_a_person_is_told_whether_it_is_worse_or_only_not_better(
    verdict: Literal["reject", "undecided"], high: float, words: str
) -> None:
    assert refusal(Decision(verdict=verdict, why="because", low=-1.0, high=high, n_windows=99)) == words

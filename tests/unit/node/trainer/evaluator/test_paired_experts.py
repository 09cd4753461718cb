"""Two experts of one place in one batch: their gains are those of a model that has taken the offered one in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import InvalidInputError
from node.model.expert_file import ExpertId
from node.model.moe import LocalExperts
from node.trainer.evaluator.paired_experts import PairedExperts, paired_experts_model, window_gains
from node.trainer.evaluator.sequential_test import SequentialTestConfig, decide
from node.trainer.train_step import build_transformer, next_token_loss
from tests.support.offers import present, put, weights
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from node.model.transformer import Transformer
    from node.model.trunk import Trunk

MANIFEST = small_manifest(dtype="fp64", codec="fp64")
PLACE = ExpertId(0, 5)


@pytest.fixture
def experts() -> LocalExperts:
    return LocalExperts(MANIFEST)


@pytest.fixture
def model(experts: LocalExperts) -> Transformer:
    generator = torch.Generator().manual_seed(1)
    return build_transformer(MANIFEST, experts, generator).eval()


def windows(n: int) -> torch.Tensor:
    return torch.randint(256, (n, MANIFEST.model.context + 1), generator=torch.Generator().manual_seed(2))


def losses(model: Transformer, ids: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return [float(next_token_loss(model, window[None], torch.device("cpu"))) for window in ids]


def tried(model: Transformer, experts: LocalExperts, offered: dict[str, torch.Tensor], place: ExpertId) -> Trunk:
    paired_experts = PairedExperts(experts, place, present(experts, place), offered, MANIFEST)
    return paired_experts_model(MANIFEST, model.state_dict(), paired_experts)


@pytest.mark.parametrize("place", [ExpertId(0, 5), ExpertId(1, 5)], ids=["first layer", "last layer"])
def test_gains_are_those_of_the_whole_model_once_it_has_taken_the_expert_in(
    model: Transformer, experts: LocalExperts, place: ExpertId
) -> None:
    ids = windows(6)
    gains = window_gains(tried(model, experts, weights(), place), ids)
    before = losses(model, ids)
    put(experts, place, weights())
    after = losses(model, ids)
    assert gains == pytest.approx([b - a for b, a in zip(before, after, strict=True)], abs=1e-12)
    assert max(abs(gain) for gain in gains) > 1e-4


def test_the_expert_that_is_there_already_gains_nothing_and_is_not_accepted(
    model: Transformer, experts: LocalExperts
) -> None:
    gains = window_gains(tried(model, experts, present(experts, PLACE), PLACE), windows(40))
    assert max(abs(gain) for gain in gains) < 1e-12
    assert decide(gains, len(gains), SequentialTestConfig(pilot=8)).verdict == "reject"


def test_trying_an_offer_changes_neither_the_trunk_nor_the_experts(model: Transformer, experts: LocalExperts) -> None:
    before = losses(model, windows(4))
    window_gains(tried(model, experts, weights(), PLACE), windows(4))
    assert losses(model, windows(4)) == before


def test_neither_of_the_two_is_asked_of_a_host(
    model: Transformer, experts: LocalExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    paired_experts = tried(model, experts, weights(), PLACE)
    gains = window_gains(paired_experts, windows(4))
    # Were it asked, it could answer badly: what it holds now changes nothing.
    put(experts, PLACE, {name: torch.zeros_like(tensor) for name, tensor in weights().items()})
    assert window_gains(paired_experts, windows(4)) == gains
    without = torch.ones(16, dtype=torch.bool)
    without[PLACE.expert] = False
    monkeypatch.setattr(experts, "live_experts", lambda layer: without if layer == 0 else torch.ones(16) > 0)
    assert window_gains(paired_experts, windows(4)) == gains


def test_up_to_its_layer_every_other_expert_is_asked_once_for_both(
    model: Transformer, experts: LocalExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    real = experts.forward

    def forward(layer: int, x_TD: torch.Tensor, *rest: Any, **keep: Any) -> Any:
        asked.append((layer, len(x_TD)))
        return real(layer, x_TD, *rest, **keep)

    monkeypatch.setattr(experts, "forward", forward)
    window_gains(tried(model, experts, weights(), PLACE), windows(3))
    context = MANIFEST.model.context
    assert asked == [(0, 3 * context), (1, 6 * context)]


def test_an_offer_is_not_trained(model: Transformer, experts: LocalExperts) -> None:
    with pytest.raises(InvalidInputError, match="evaluated, not trained"):
        tried(model, experts, weights(), PLACE)(windows(1)[:, :-1])

"""An offered expert: its bytes are checked by field, and its gains are those of a model that has taken it in."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from node.acceptance import AcceptanceConfig, decide
from node.moe import LocalExperts, LocalMoE
from node.offered import MAX_HEADER_BYTES, Offer, Rivals, max_offer_bytes, read_offer, rivals_model, window_gains
from node.training import build_trunk, next_byte_loss
from protocol.errors import InvalidInputError, KilohiveError
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from node.transformer import Transformer

MANIFEST = small_manifest(dtype="fp64", codec="fp64")
SHAPES = {"w_in": (16, 8), "w_out": (8, 16)}
LAYER, EXPERT = 0, 5


def weights(**changes: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {**normal, **changes}


@pytest.fixture
def experts() -> LocalExperts:
    return LocalExperts(MANIFEST)


@pytest.fixture
def model(experts: LocalExperts) -> Transformer:
    generator = torch.Generator().manual_seed(1)
    layers = [LocalMoE(experts, layer, generator) for layer in range(MANIFEST.model.n_layers)]
    return build_trunk(MANIFEST, layers, generator).eval()


def windows(n: int) -> torch.Tensor:
    return torch.randint(256, (n, MANIFEST.model.context + 1), generator=torch.Generator().manual_seed(2))


def losses(model: Transformer, ids: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return [float(next_byte_loss(model, window[None], torch.device("cpu"))) for window in ids]


def present(experts: LocalExperts) -> Offer:
    block = next(block for block in experts.blocks[LAYER] if EXPERT in block.experts)
    own = {name: block.params[name][EXPERT - block.experts.start].clone() for name in SHAPES}
    return Offer(layer=LAYER, expert=EXPERT, weights=own)


def tried(model: Transformer, experts: LocalExperts, offer: Offer) -> Transformer:
    return rivals_model(MANIFEST, model.state_dict(), Rivals(experts, present(experts), offer, MANIFEST))


def take_in(experts: LocalExperts, offer: Offer) -> None:
    block = next(block for block in experts.blocks[offer.layer] if offer.expert in block.experts)
    for name, tensor in offer.weights.items():
        block.params[name][offer.expert - block.experts.start] = tensor


def test_gains_are_those_of_the_whole_model_once_it_has_taken_the_expert_in(
    model: Transformer, experts: LocalExperts
) -> None:
    offer = read_offer(save(weights()), LAYER, EXPERT, MANIFEST)
    ids = windows(6)
    gains = window_gains(tried(model, experts, offer), ids)
    before = losses(model, ids)
    take_in(experts, offer)
    after = losses(model, ids)
    assert gains == pytest.approx([b - a for b, a in zip(before, after, strict=True)], abs=1e-12)
    assert max(abs(gain) for gain in gains) > 1e-4


def test_the_expert_that_is_there_already_gains_nothing_and_is_not_accepted(
    model: Transformer, experts: LocalExperts
) -> None:
    offer = present(experts)
    gains = window_gains(tried(model, experts, offer), windows(40))
    assert max(abs(gain) for gain in gains) < 1e-12
    assert decide(gains, len(gains), AcceptanceConfig(pilot=8)).verdict == "reject"


def test_trying_an_offer_changes_neither_the_trunk_nor_the_experts(model: Transformer, experts: LocalExperts) -> None:
    offer = read_offer(save(weights()), LAYER, EXPERT, MANIFEST)
    before = losses(model, windows(4))
    window_gains(tried(model, experts, offer), windows(4))
    assert losses(model, windows(4)) == before


def test_neither_of_the_two_is_asked_of_a_host(
    model: Transformer, experts: LocalExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = read_offer(save(weights()), LAYER, EXPERT, MANIFEST)
    rivals = tried(model, experts, offer)
    gains = window_gains(rivals, windows(4))
    # Were it asked, it could answer badly: what it holds now changes nothing.
    take_in(experts, Offer(layer=LAYER, expert=EXPERT, weights={n: torch.zeros(s) for n, s in SHAPES.items()}))
    assert window_gains(rivals, windows(4)) == gains
    without = torch.ones(16, dtype=torch.bool)
    without[EXPERT] = False
    monkeypatch.setattr(experts, "live_experts", lambda layer: without if layer == LAYER else torch.ones(16) > 0)
    assert window_gains(rivals, windows(4)) == gains


def test_experts_of_two_places_are_not_compared(experts: LocalExperts) -> None:
    with pytest.raises(InvalidInputError, match="another place"):
        Rivals(experts, present(experts), Offer(layer=LAYER, expert=EXPERT + 1, weights=weights()), MANIFEST)


def test_an_offer_is_not_trained(model: Transformer, experts: LocalExperts) -> None:
    offer = read_offer(save(weights()), LAYER, EXPERT, MANIFEST)
    with pytest.raises(InvalidInputError, match="evaluated, not trained"):
        tried(model, experts, offer)(windows(1)[:, :-1])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"w_in": torch.zeros(8, 16, dtype=torch.float64)}, "offer.w_in"),
        ({"w_in": torch.zeros(16, 8)}, "offer.w_in"),
        ({"w_out": torch.full((8, 16), math.nan, dtype=torch.float64)}, "offer.w_out"),
        ({"w_out": torch.full((8, 16), math.inf, dtype=torch.float64)}, "offer.w_out"),
        ({"extra": torch.zeros(1)}, "w_in, w_out"),
    ],
    ids=["shape", "type", "nan", "infinity", "name"],
)
def test_an_offer_that_is_no_expert_of_the_run_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError, match=field):
        read_offer(save(weights(**changes)), LAYER, EXPERT, MANIFEST)


@pytest.mark.parametrize(("layer", "expert"), [(-1, 0), (2, 0), (0, -1), (0, 16)])
def test_a_place_outside_of_the_grid_is_refused(layer: int, expert: int) -> None:
    with pytest.raises(InvalidInputError, match="2 layers of 16 experts"):
        read_offer(save(weights()), layer, expert, MANIFEST)


def test_a_header_that_claims_terabytes_is_refused_before_anything_is_allocated() -> None:
    claimed = {name: {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 1 << 43]} for name in SHAPES}
    header = json.dumps(claimed).encode()
    with pytest.raises(InvalidInputError, match=r"offer\.w_in"):
        read_offer(len(header).to_bytes(8, "little") + header, LAYER, EXPERT, MANIFEST)
    with pytest.raises(InvalidInputError, match=f"{MAX_HEADER_BYTES}"):
        read_offer((1 << 60).to_bytes(8, "little"), LAYER, EXPERT, MANIFEST)


def test_a_right_header_over_too_few_bytes_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no safetensors file"):
        read_offer(save(weights())[:-8], LAYER, EXPERT, MANIFEST)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_typed_error(data: bytes) -> None:
    with pytest.raises(KilohiveError):
        read_offer(data, LAYER, EXPERT, MANIFEST)


def test_the_longest_offer_holds_the_tensors_and_a_header() -> None:
    assert len(save(weights())) <= max_offer_bytes(MANIFEST) == 8 + MAX_HEADER_BYTES + 8 * 2 * 16 * 8

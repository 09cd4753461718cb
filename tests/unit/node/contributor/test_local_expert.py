"""An expert trained at home learns what it would learn at a host from the same text, and nothing else changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from node.contributor.local_expert import ExpertsWithOneLocal, LocalExpertSteps
from node.model.expert_file import ExpertId
from node.model.learning_rate import learning_rate_factor
from node.model.moe import LocalExperts, MoE
from node.trainer.train_step import build_transformer, next_token_loss
from tests.support.offers import present
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from node.model.experts.block import Block, BlockGradients
    from node.model.moe import Experts
    from node.model.transformer import Transformer
    from protocol.manifest import Manifest

MANIFEST = small_manifest(dtype="fp64", codec="fp64")
HASHED = small_manifest(
    dtype="fp64", codec="fp64", model={"gate": "hash", "gate_reads": "tokens", "gate_heads": 2, "smear": 2}
)
each_manifest = pytest.mark.parametrize("manifest", [MANIFEST, HASHED], ids=["topk", "hash"])
RATE = MANIFEST.optimizer.expert_lr * learning_rate_factor(MANIFEST.optimizer, 0)
CPU = torch.device("cpu")


class NotTaught(LocalExperts):
    """What a dispatcher is that asks for gradients alone."""

    def learn(self, block: Block, gradients: BlockGradients, lr: float) -> None:
        pass


def model_of(experts: Experts, manifest: Manifest = MANIFEST) -> Transformer:
    return build_transformer(manifest, experts, torch.Generator().manual_seed(1)).eval()


def layer_of(model: Transformer, layer: int) -> MoE:
    found = model.moe_layers[layer]
    assert isinstance(found, MoE)
    return found


def windows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (8, MANIFEST.model.context + 1), generator=generator)


@each_manifest
@pytest.mark.parametrize("place", [ExpertId(0, 5), ExpertId(1, 5)], ids=["below others", "in the last layer"])
def test_a_first_step_is_that_of_a_host(place: ExpertId, manifest: Manifest) -> None:
    hosted = LocalExperts(manifest)
    next_token_loss(model_of(hosted, manifest), windows(0), CPU).backward()
    home = ExpertsWithOneLocal(NotTaught(manifest), place, present(LocalExperts(manifest), place), manifest)
    model = model_of(home, manifest)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    LocalExpertSteps(model, layer_of(model, place.layer), home, CPU).step(windows(0), RATE)
    for name, tensor in home.weights.items():
        assert not torch.equal(tensor, present(LocalExperts(manifest), place)[name])
        torch.testing.assert_close(tensor, present(hosted, place)[name], rtol=0, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_many_steps_lower_the_loss_of_the_text() -> None:
    place = ExpertId(0, 5)
    home = ExpertsWithOneLocal(NotTaught(MANIFEST), place, present(LocalExperts(MANIFEST), place), MANIFEST)
    model = model_of(home)
    training = LocalExpertSteps(model, layer_of(model, 0), home, CPU)
    losses = [training.step(windows(0), 1e-2) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_an_expert_that_no_token_chose_stays_as_it_is() -> None:
    place, start = ExpertId(0, 5), present(LocalExperts(MANIFEST), ExpertId(0, 5))
    home = ExpertsWithOneLocal(NotTaught(MANIFEST), place, start, MANIFEST)
    x_TD = torch.ones(3, MANIFEST.model.d_model, dtype=torch.float64)
    ids_TK = torch.tensor([[0, 1], [1, 2], [3, 0]])
    combined = home.forward(0, x_TD, ids_TK, torch.full((3, 2), 0.5, dtype=torch.float64), keep=True)
    grad_x_TD, grad_weight = home.backward(combined.ticket, x_TD)
    home.step(1.0)
    assert combined.answered_TK.all()
    assert (grad_x_TD.shape, grad_weight.shape) == ((3, MANIFEST.model.d_model), (6,))
    assert all(torch.equal(home.weights[name], start[name]) for name in start)

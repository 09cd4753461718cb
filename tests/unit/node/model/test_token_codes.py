"""What a token is before any layer has read it: tokens before it mixed in, and codes that never change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import InvalidInputError
from node.model.moe import LocalExperts, LocalMoE
from node.model.token_codes import TokenCodes, first_weights, smeared
from node.trainer.train_step import build_transformer
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from node.model.transformer import Transformer

MANIFEST = small_manifest(model={"smear": 2, "gate_reads": "tokens", "gate_score": "softmax"})
CONTEXT = MANIFEST.model.context


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (3, CONTEXT), generator=seeded(seed))


def test_smearing_adds_what_came_before_and_nothing_from_before_the_start() -> None:
    x_BTD, weights_JD = torch.randn(2, 5, 4), torch.randn(2, 4)
    found = smeared(x_BTD, weights_JD)
    for position in range(5):
        wanted = x_BTD[:, position].clone()
        for back in (1, 2):
            if position >= back:
                wanted += weights_JD[back - 1] * x_BTD[:, position - back]
        torch.testing.assert_close(found[:, position], wanted)


def test_the_first_weights_fall_with_distance_and_have_random_signs() -> None:
    weights_JD = first_weights(3, 64, seeded())
    torch.testing.assert_close(weights_JD.abs(), torch.tensor([0.7, 0.49, 0.343])[:, None].expand(3, 64))
    assert (weights_JD > 0).any(1).all()
    assert (weights_JD < 0).any(1).all()


@pytest.mark.parametrize("head", [0, 1, 2])
def test_a_heads_code_is_of_its_last_tokens_and_of_nothing_else(head: int) -> None:
    codes, ids_BT = TokenCodes(replace(MANIFEST.model, gate_heads=3), seeded()), some_ids()
    code_BTD = codes(ids_BT).view(3, CONTEXT, 3, -1)[:, :, head]
    assert (code_BTD.abs() == 1).all()
    other = ids_BT.clone()
    other[:, 4] = (other[:, 4] + 1) % 256
    changed = (codes(other).view(3, CONTEXT, 3, -1)[:, :, head] != code_BTD).any(2)
    assert changed.nonzero()[:, 1].unique().tolist() == list(range(4, 6 + head))
    one_two, two_one = codes(torch.tensor([[1, 2], [2, 1]])).view(2, 2, 3, -1)[:, 1, head]
    assert not torch.equal(one_two, two_one), "order counts"


def test_codes_of_contexts_that_differ_in_one_token_are_as_different_as_random_ones() -> None:
    codes = TokenCodes(replace(MANIFEST.model, d_model=4096, gate_heads=4), seeded())
    ids_BT = torch.tensor([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 3, 9]])
    last_BD = codes(ids_BT).view(3, 4, 4, -1)[:, -1, -1]
    likeness = last_BD @ last_BD.T / 4096
    assert (likeness - torch.eye(3)).abs().max() < 0.1  # six standard deviations


def model(seed: int = 0, **changes: object) -> Transformer:
    manifest = replace(MANIFEST, model=replace(MANIFEST.model, **changes))  # type: ignore[arg-type]
    return build_transformer(manifest, LocalExperts(manifest), seeded(seed))


def test_every_trainer_draws_the_same_codes_and_no_checkpoint_has_them() -> None:
    one, other = model(), model()
    assert one.codes is not None
    assert other.codes is not None
    assert torch.equal(one.codes(some_ids()), other.codes(some_ids()))
    assert not [name for name in one.state_dict() if name.startswith("codes")]
    assert "smear_JD" in one.state_dict()
    assert not list(one.codes.parameters())


def test_a_trunk_without_the_new_fields_starts_as_one_with_them_does() -> None:
    new, old = model(), model(smear=0, gate_reads="hidden")
    assert old.smear_JD is None
    assert old.codes is None
    assert new.state_dict().keys() - old.state_dict().keys() == {"smear_JD"}
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name]), name


def test_a_smeared_trunk_whose_gates_read_codes_stays_causal() -> None:
    trunk, ids_BT = model().double().eval(), some_ids()
    later = ids_BT.clone()
    later[:, 6:] = (later[:, 6:] + 1) % 256
    with torch.no_grad():
        before, after = trunk(ids_BT), trunk(later)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert (before[:, 6:] != after[:, 6:]).any()


def test_the_gates_of_all_layers_choose_by_the_tokens_alone() -> None:
    trunk, ids_BT = model().eval(), some_ids()
    chosen: list[torch.Tensor] = []
    for layer in trunk.moe_layers:
        layer.gate.register_forward_hook(lambda _gate, _x, output: chosen.append(output.expert_ids_TK))  # type: ignore[union-attr]
    with torch.no_grad():
        trunk(ids_BT)
        trunk.embedding_VD.normal_()
        trunk(ids_BT)
    n = len(trunk.moe_layers)
    assert len(chosen) == 2 * n > 2
    for before, after in zip(chosen[:n], chosen[n:], strict=True):
        assert torch.equal(before, after)


def test_what_the_gate_reads_has_the_shape_of_what_the_experts_read() -> None:
    layer = LocalMoE(LocalExperts(MANIFEST), 0, seeded())
    x_TD, code_TD = torch.randn(2, 6, MANIFEST.model.d_model)
    assert not torch.equal(layer(x_TD), layer(x_TD, code_TD))
    assert torch.equal(layer(x_TD, x_TD), layer(x_TD))
    with pytest.raises(InvalidInputError, match=r"gate_x_TD: has shape \(5, 16\); it takes x_TD's \(6, 16\)"):
        layer(x_TD, code_TD[:5])
    with pytest.raises(InvalidInputError, match=r"has shape \(6, 3, 16\); this gate takes"):
        layer(x_TD, code_TD[:, None].expand(6, 3, -1))

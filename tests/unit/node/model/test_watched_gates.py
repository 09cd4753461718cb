"""What gates choose is seen from outside for a while, and experts can be taken away for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from node.model.gate import build_gate, choices_seen, without_experts
from node.model.pairs import NO_EXPERT
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from node.model.gate import Gate, GateOutput


def gates(n: int = 2) -> list[Gate]:
    generator = torch.Generator().manual_seed(0)
    return [build_gate(small_manifest(model={"gate": "topk"}).model, generator) for _ in range(n)]


def tokens() -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def test_choices_are_seen_gate_by_gate_and_only_while_it_lasts() -> None:
    both, x_TD = gates(), tokens()
    seen: list[tuple[int, GateOutput]] = []
    with choices_seen(both, lambda index, output: seen.append((index, output))):
        chosen = [both[1](x_TD), both[0](x_TD)]
    both[0](x_TD)
    assert [index for index, _ in seen] == [1, 0]
    assert all(output is own for (_, output), own in zip(seen, chosen, strict=True))


def test_a_block_that_fails_leaves_the_gates_as_they_were() -> None:
    both, x_TD = gates(), tokens()
    whole = both[0](x_TD)
    with pytest.raises(ZeroDivisionError), without_experts(both, [torch.arange(16)] * 2):
        _ = 1 / 0
    assert torch.equal(both[0](x_TD).expert_ids_TK, whole.expert_ids_TK)


def test_without_an_expert_its_tokens_make_do_with_their_others() -> None:
    (gate,), x_TD = gates(1), tokens()
    whole = gate(x_TD)
    lost = int(whole.expert_ids_TK[0, 0])
    with without_experts([gate], [torch.tensor([lost])]):
        left = gate(x_TD)
    assert left.expert_ids_TK[0].tolist() == [NO_EXPERT, int(whole.expert_ids_TK[0, 1])]
    assert left.weights_TK[0].tolist() == pytest.approx([0.0, 1.0])
    spared_T = (whole.expert_ids_TK != lost).all(1)
    assert torch.equal(left.expert_ids_TK[spared_T], whole.expert_ids_TK[spared_T])
    torch.testing.assert_close(left.weights_TK[spared_T], whole.weights_TK[spared_T])


def test_what_is_seen_inside_is_what_is_left() -> None:
    (gate,), x_TD = gates(1), tokens()
    seen: list[GateOutput] = []
    with without_experts([gate], [torch.arange(16)]), choices_seen([gate], lambda _, output: seen.append(output)):
        gate(x_TD)
    assert bool((seen[0].expert_ids_TK == NO_EXPERT).all())
    assert not bool(seen[0].weights_TK.any())

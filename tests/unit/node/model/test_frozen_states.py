"""What frozen layers give for a text is computed once, kept while it fits, and the same as ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import Gemma2Config, GPT2Config

from node.model.frozen_states import FrozenStates, SplitModel
from node.model.pretrained import decoder_layers
from node.model.pretrained_files import loaded
from tests.support.tiny_pretrained import KINDS, SHAPE, new_model, save_pretrained

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

IDS = torch.tensor([[5, 17, 299, 3], [42, 42, 8, 100]])


@pytest.fixture(params=sorted(KINDS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    folder = save_pretrained(tmp_path / "model", request.param)
    return loaded(folder, [path.name for path in folder.iterdir()], torch.float32)


class Doubling:
    """Computes states, and counts for how many sequences."""

    def __init__(self) -> None:
        self.n_computed = 0

    def __call__(self, ids_BT: torch.Tensor) -> torch.Tensor:
        self.n_computed += len(ids_BT)
        return ids_BT[:, :, None].float() * 2


def test_each_sequence_is_computed_once_in_whatever_company_it_comes() -> None:
    kept, compute = FrozenStates(), Doubling()
    first = kept.of(IDS[:1], compute)
    both = kept.of(IDS, compute)
    again = kept.of(IDS[[1, 0, 1]], compute)
    assert compute.n_computed == 2
    torch.testing.assert_close(first, both[:1])
    torch.testing.assert_close(again, both[[1, 0, 1]])
    torch.testing.assert_close(both, IDS[:, :, None].float() * 2)


def test_what_was_computed_elsewhere_is_taken_as_it_is() -> None:
    kept, compute = FrozenStates(), Doubling()
    kept.keep(IDS, Doubling()(IDS))
    torch.testing.assert_close(kept.of(IDS[[1, 0]], compute), IDS[[1, 0], :, None].float() * 2)
    assert compute.n_computed == 0


def test_what_was_used_longest_ago_goes_where_all_do_not_fit() -> None:
    kept, compute = FrozenStates(max_bytes=2 * 4 * 4), Doubling()
    rows = [torch.full((1, 4), value) for value in (1, 2, 3)]
    kept.of(rows[0], compute)
    kept.of(rows[1], compute)
    kept.of(rows[0], compute)
    kept.of(rows[2], compute)  # the second goes
    assert compute.n_computed == 3
    kept.of(rows[0], compute)
    assert compute.n_computed == 3
    kept.of(rows[1], compute)
    assert compute.n_computed == 4


def test_a_sequence_that_fits_not_at_all_is_computed_each_time() -> None:
    kept, compute = FrozenStates(max_bytes=3), Doubling()
    for _ in range(2):
        torch.testing.assert_close(kept.of(IDS, compute), IDS[:, :, None].float() * 2)
    assert compute.n_computed == 4


@pytest.mark.parametrize("first", [1, 3])
def test_two_parts_say_what_the_whole_says_and_the_lower_one_ends_where_it_should(
    model: PreTrainedModel, first: int
) -> None:
    layers = decoder_layers(model)
    ran: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    split = SplitModel(model, layers, first)
    assert split.works()
    ran.clear()
    states_BTD = split.states(IDS)
    assert ran == list(range(first))
    ran.clear()
    with torch.no_grad():
        found = split.logits(states_BTD)
        assert ran == list(range(first, len(layers)))
        torch.testing.assert_close(found, model(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_both_parts_go_to_a_device_together(model: PreTrainedModel) -> None:
    split = SplitModel(model, decoder_layers(model), 2)
    torch.nn.Module.to(model, torch.device("meta"))
    split.to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in (*split._upper.parameters(), *split._upper.buffers()))


def test_a_model_that_adds_something_to_what_it_is_given_is_not_split() -> None:
    torch.manual_seed(5)
    model = new_model(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=300, n_positions=16))
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)
    assert not SplitModel(model.eval(), decoder_layers(model), 2).works()


def test_a_model_whose_layers_are_of_several_kinds_is_not_split() -> None:
    shape = {**SHAPE, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 16}
    model = new_model(Gemma2Config(**shape))
    assert not SplitModel(model.eval(), decoder_layers(model), 2).works()

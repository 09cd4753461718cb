"""The seed model, read from its package and run in plain torch. Skipped where the package is not installed."""

from __future__ import annotations

import random

import pytest
import torch

from common.errors import DataError
from experiments.adapters.seed.model import Seed, load_seed

TOWER = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
)


@pytest.fixture(scope="module", name="seed")
def fixture_seed() -> Seed:
    try:
        return load_seed()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", name="packed")
def fixture_packed() -> Seed:
    try:
        return load_seed(packed=True)
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("prompt", "likeliest"),
    [
        ("The capital of France is", " Paris"),
        ("Monday, Tuesday, Wednesday, Thursday,", " Friday"),
        ("Water freezes at 0 degrees", " Celsius"),
        ("1, 2, 3, 4, 5, 6,", " 7"),
    ],
)
def test_the_seed_goes_on_as_anybody_would(seed: Seed, prompt: str, likeliest: str) -> None:
    assert seed.continuation(prompt, 2).startswith(likeliest)


def test_english_costs_the_seed_few_nats_and_the_same_words_shuffled_many(seed: Seed) -> None:
    words = TOWER.split()
    random.Random(0).shuffle(words)
    assert 1.0 < seed.nats_per_token(TOWER) < 2.5
    assert seed.nats_per_token(" ".join(words)) > 4.5


def test_any_text_comes_back_from_its_tokens(seed: Seed) -> None:
    for text in ("Grüße, œuvre, ∀x\n\n\t 12345 don't", "<|im_start|>user", ""):
        assert seed.tokenizer.decode(seed.tokenizer.encode(text)) == text
    assert len(seed.tokenizer.encode("12345")) == 5
    assert len(seed.tokenizer.encode("<|im_start|>")) > 1


def test_weights_kept_in_four_bits_give_the_same_logits_in_a_fifth_of_the_memory(seed: Seed, packed: Seed) -> None:
    ids = torch.tensor([seed.tokenizer.encode(TOWER)])
    with torch.no_grad():
        torch.testing.assert_close(packed.model(ids), seed.model(ids), rtol=1e-4, atol=1e-3)
    dense_bytes, packed_bytes = (sum(b.nbytes for b in s.model.buffers()) for s in (seed, packed))
    assert packed_bytes < dense_bytes / 5
    assert packed_bytes < 100e6


def test_packed_weights_keep_no_dense_copy_for_backward_and_give_the_same_gradient(seed: Seed, packed: Seed) -> None:
    x_BTD = torch.randn(1, 8, 576, generator=torch.Generator().manual_seed(0))
    targets_BT = torch.arange(8)[None]
    gradients: list[torch.Tensor] = []
    most_values: list[int] = []
    for own in (seed, packed):
        x_BTD = x_BTD.detach().clone().requires_grad_()
        kept: list[int] = []

        def note(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = own.model.nats(own.model.run(x_BTD, 28), targets_BT).mean()
        gradients += torch.autograd.grad(loss, x_BTD)
        most_values.append(max(kept))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert most_values == [49152 * 576, 8 * 49152]  # the table of tokens; the logits, fewer than an FFN's matrix


def test_layers_run_apart_give_what_they_give_together(seed: Seed) -> None:
    ids = torch.tensor([seed.tokenizer.encode(TOWER)])
    with torch.no_grad():
        lower = seed.model.run(seed.model.embed(ids), 0, 26)
        torch.testing.assert_close(seed.model.logits(seed.model.run(lower, 26)), seed.model(ids))


def test_an_adapter_sees_what_the_ffn_sees_and_is_added_to_it(seed: Seed) -> None:
    ids = torch.tensor([seed.tokenizer.encode(TOWER)])
    seen: list[torch.Tensor] = []

    class Nothing(torch.nn.Module):
        def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
            seen.append(x_ND)
            return torch.zeros_like(x_ND)

    with torch.no_grad():
        plain = seed.model.run(seed.model.embed(ids), 0)
        same = seed.model.run(seed.model.embed(ids), 0, adapters={29: Nothing()})
    assert torch.equal(plain, same)
    assert [x.shape for x in seen] == [(ids.shape[1], 576)]
    assert not any(p.requires_grad for p in seed.model.parameters())

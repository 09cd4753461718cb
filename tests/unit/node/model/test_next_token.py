"""Which token comes next: the laws of temperature, top-k and top-p, and one generator for each sequence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DivergedError, InvalidInputError
from node.model import next_token
from node.model.next_token import GenerationConfig, choose, probabilities

# Eighths: logits that are not the same never have probabilities that are the same but for rounding.
LOGITS = st.lists(st.integers(-400, 400), min_size=1, max_size=12).map(lambda values: torch.tensor(values).double() / 8)
CONFIGS = st.builds(
    GenerationConfig,
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
)


def softmax(logits_V: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.softmax(logits_V / temperature, dim=0)


@given(LOGITS, CONFIGS)
@settings(deadline=None)
def test_what_is_drawn_by_sums_to_one_and_keeps_the_likeliest(logits_V: torch.Tensor, config: GenerationConfig) -> None:
    found_V = probabilities(logits_V, config)
    assert float(found_V.sum()) == pytest.approx(1)
    assert found_V[logits_V == logits_V.max()].max() == found_V.max() > 0
    kept_V = found_V > 0
    assert (logits_V[~kept_V] <= logits_V[kept_V].min()).all()


@given(LOGITS, CONFIGS)
@settings(deadline=None)
def test_tokens_that_are_kept_keep_their_odds(logits_V: torch.Tensor, config: GenerationConfig) -> None:
    found_V, all_V = probabilities(logits_V, config), softmax(logits_V, config.temperature)
    kept_V = found_V > 0
    torch.testing.assert_close(found_V[kept_V], all_V[kept_V] / all_V[kept_V].sum())


@given(LOGITS, CONFIGS)
@settings(deadline=None)
def test_top_k_keeps_so_many_however_many_are_as_likely(logits_V: torch.Tensor, config: GenerationConfig) -> None:
    config = replace(config, top_p=1.0)
    for logits in (logits_V, torch.zeros_like(logits_V)):
        possible = int((softmax(logits, config.temperature) > 0).sum())
        kept = int((probabilities(logits, config) > 0).sum())
        assert kept == min(config.top_k or len(logits), possible)


@given(LOGITS, CONFIGS)
@settings(deadline=None)
def test_top_p_keeps_the_fewest_that_reach_it(logits_V: torch.Tensor, config: GenerationConfig) -> None:
    config = replace(config, top_k=0)
    kept_V = probabilities(logits_V, config) > 0
    all_V = softmax(logits_V, config.temperature)
    together, least = float(all_V[kept_V].sum()), float(all_V[kept_V].min())
    assert together >= config.top_p - 1e-9
    assert together - least < config.top_p + 1e-9


def test_top_p_counts_what_top_k_has_left() -> None:
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()
    # Of 0.4 and 0.3 alone the first has 0.57, which is enough for 0.5; of all four it has not.
    both = GenerationConfig(top_k=2, top_p=0.5)
    assert probabilities(logits_V, both).tolist() == [1, 0, 0, 0]
    assert (probabilities(logits_V, replace(both, top_k=0)) > 0).tolist() == [True, True, False, False]


@given(LOGITS, CONFIGS, st.integers(1, 12))
@settings(deadline=None)
def test_it_is_the_same_however_many_of_the_likeliest_are_looked_at_first(
    logits_V: torch.Tensor, config: GenerationConfig, at_first: int
) -> None:
    sorted_all_V = probabilities(logits_V, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "LIKELIEST_AT_FIRST", at_first)
        torch.testing.assert_close(probabilities(logits_V, config), sorted_all_V)


@pytest.mark.parametrize("temperature", [1e-310, 1e-5, 1e5])
def test_no_temperature_is_too_low_or_too_high(temperature: float) -> None:
    found_V = probabilities(torch.tensor([3.0, 40.0, 2.0]).double(), GenerationConfig(temperature=temperature))
    wanted = [0, 1, 0] if temperature < 1 else [1 / 3] * 3
    assert found_V.tolist() == pytest.approx(wanted, abs=1e-3)


def test_temperature_zero_takes_the_likeliest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    config = GenerationConfig(temperature=0.0, top_k=3, top_p=0.1)
    assert choose(torch.tensor([1.0, 5.0, 5.0]), config, generator)[0] == 1
    assert torch.equal(generator.get_state(), before)


def test_a_drawn_token_comes_as_often_as_it_is_likely() -> None:
    logits_V, generator = torch.tensor([0.5, 0.3, 0.2]).log(), torch.Generator().manual_seed(0)
    drawn = [choose(logits_V, GenerationConfig(), generator)[0] for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)  # four standard deviations


def test_a_token_that_is_left_out_is_never_drawn_wherever_it_stands() -> None:
    logits_V, generator = torch.tensor([0.0, 3.0, 0.0, 3.0, 0.0]), torch.Generator().manual_seed(0)
    config = GenerationConfig(top_k=2)
    assert {choose(logits_V, config, generator)[0] for _ in range(500)} == {1, 3}


def test_the_log_probability_is_the_models_own() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.2]).log() + 7
    for config in (GenerationConfig(temperature=0.0), GenerationConfig(temperature=9.0, top_k=1)):
        token, log_probability = choose(logits_V, config, torch.Generator())
        assert token == 0
        assert log_probability == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_a_model_that_has_diverged(value: float) -> None:
    with pytest.raises(DivergedError, match="logits are not finite: take a checkpoint from before"):
        choose(torch.tensor([1.0, value]), GenerationConfig(), torch.Generator())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": -0.1}, "temperature: is -0.1; it takes 0 or more"),
        ({"temperature": math.nan}, "temperature: is nan"),
        ({"temperature": math.inf}, "temperature: is inf"),
        ({"top_p": 0.0}, "top_p: is 0.0; it takes more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p: is 1.1"),
        ({"top_p": math.nan}, "top_p: is nan"),
        ({"top_k": -1}, "top_k: is -1; it takes 0 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens: is -1; it takes 0 or more"),
        ({"stop": ((1,), ())}, "stop: holds an empty run of ids"),
        ({"seed": 1 << 64}, "seed: is 18446744073709551616; it takes -9223372036854775808 to 18446744073709551615"),
    ],
)
def test_a_field_out_of_its_range_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        GenerationConfig(**changes)  # type: ignore[arg-type]
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("seed", [-(1 << 63), -1, 0, (1 << 64) - 1])
def test_every_seed_in_the_range_is_one_that_a_generator_takes(seed: int) -> None:
    assert torch.Generator().manual_seed(GenerationConfig(seed=seed).seed).initial_seed() == seed % (1 << 64)

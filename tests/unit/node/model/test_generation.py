"""Sequences that are written in one batch: each as if it were alone, past the context and past failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import DivergedError, InvalidInputError, LimitExceededError, TooFewExpertsError
from node.model.generation import Generation, NewToken, Prompt
from node.model.next_token import GenerationConfig, choose
from node.model.transformer import DenseFfn, Transformer
from protocol.manifest import ModelConfig
from tests.support.counted_experts import counted_model

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTEXT = 16
MODEL: dict[str, Any] = {
    "gate": "hash",
    "gate_reads": "tokens",
    "gate_score": "softmax",
    "gate_heads": 2,
    "smear": 2,
}
SMALL = ModelConfig(d_model=16, n_layers=2, n_heads=2, context=CONTEXT)


def dense_model(model: ModelConfig = SMALL) -> Transformer:
    generator = torch.Generator().manual_seed(0)
    ffns = [DenseFfn(model.d_model, 2 * model.d_model, generator) for _ in range(model.n_layers)]
    return Transformer(model, ffns, generator).double().eval()


def prompt(ids: Sequence[int], n: int = 6, **changes: Any) -> Prompt:
    return Prompt(ids=ids, config=GenerationConfig(max_new_tokens=n, **changes))


def written(generation: Generation) -> dict[int, list[int]]:
    """Tokens by sequence."""
    found: dict[int, list[int]] = {}
    for step in generation:
        for new in step:
            found.setdefault(new.sequence, []).append(new.token)
    return found


def written_without_a_cache(model: Transformer, of: Prompt) -> list[int]:
    """What the definition says: the whole window again for every token, half of it dropped when it is full."""
    window, tokens = list(of.ids)[-model.context :], list[int]()
    generator = torch.Generator().manual_seed(of.config.seed)
    while len(tokens) < of.config.max_new_tokens:
        if len(window) > model.context:
            window = window[-((model.context + 1) // 2) :]
        with torch.no_grad():
            logits_V = model(torch.tensor([window]))[0, -1]
        tokens.append(choose(logits_V, of.config, generator)[0])
        window.append(tokens[-1])
    return tokens


PROMPTS = (
    prompt([1, 2, 3], 40, temperature=0.9, seed=1),
    prompt(range(40), 9, temperature=0.0),
    prompt([7], 1, seed=2),
    prompt([5] * CONTEXT, 30, top_k=20, seed=3),
    prompt([9, 200], 20, top_p=0.7, seed=4),
)


@pytest.mark.parametrize("tokens_at_once", [1, 7, 4096])
def test_all_that_is_written_is_what_the_model_says_without_a_cache(tokens_at_once: int) -> None:
    model, _ = counted_model(**MODEL)
    found = written(Generation(model, PROMPTS, tokens_at_once))
    assert found == {index: written_without_a_cache(model, of) for index, of in enumerate(PROMPTS)}


@pytest.mark.parametrize("context", [1, 2, 3, 5])
def test_even_the_smallest_contexts_slide(context: int) -> None:
    model = dense_model(ModelConfig(d_model=16, n_layers=2, n_heads=2, context=context))
    of = prompt([3, 4], 12, seed=6)
    assert written(Generation(model, [of]))[0] == written_without_a_cache(model, of)


def test_a_sequence_says_the_same_whatever_shares_its_batch() -> None:
    model, _ = counted_model(**MODEL)
    together = written(Generation(model, PROMPTS))
    assert together == {index: written(Generation(model, [of]))[0] for index, of in enumerate(PROMPTS)}


def test_sequences_of_one_prompt_differ_by_their_seeds_alone() -> None:
    found = written(Generation(dense_model(), [prompt([1, 2], 30, seed=seed) for seed in (1, 2, 1)]))
    assert found[0] == found[2] != found[1]


def test_each_token_is_read_once_and_by_no_more_than_the_sequences_that_go_on() -> None:
    model, experts = counted_model(**MODEL)
    prompts = [prompt([1, 2, 3], 4), prompt([1], 2), prompt([1, 2], 4)]
    steps = [tuple(new.sequence for new in step) for step in Generation(model, prompts)]
    assert steps == [(0, 1, 2), (0, 1, 2), (0, 2), (0, 2)]
    assert experts.calls == [(layer, n) for n in (6, 3, 2, 2) for layer in (0, 1)]


def test_a_token_past_the_context_costs_two_at_most_on_average() -> None:
    model, experts = counted_model(**MODEL)
    n = 10 * CONTEXT
    written(Generation(model, [prompt([1], n)]))
    assert n < sum(tokens for layer, tokens in experts.calls if layer == 0) <= 2 * n
    assert max(tokens for _, tokens in experts.calls) == CONTEXT // 2


def test_a_sequence_ends_with_a_stop_or_at_its_length() -> None:
    model = dense_model()
    said = written(Generation(model, [prompt([1], 12)]))[0]
    stop = (tuple(said[4:6]), (300, 1))
    steps = list(Generation(model, [prompt([1], 12, stop=stop), prompt([1], 3, stop=stop)]))
    first = [new for step in steps for new in step if new.sequence == 0]
    second = [new for step in steps for new in step if new.sequence == 1]
    assert [new.token for new in first] == said[:6]
    assert [new.finish for new in first] == [None] * 5 + ["stop"]
    assert [new.finish for new in second] == [None, None, "length"]


def test_a_stop_in_the_prompt_or_half_in_it_ends_nothing() -> None:
    model = dense_model()
    said = written(Generation(model, [prompt([1, 2], 8)]))[0]
    stop = ((1, 2), (2, said[0]))
    assert written(Generation(model, [prompt([1, 2], 8, stop=stop)]))[0] == said


def test_each_token_comes_with_its_log_probability() -> None:
    model, window = dense_model(), [1, 2, 3]
    for (new,) in Generation(model, [prompt(window, 4, temperature=3.0, top_k=5)]):
        with torch.no_grad():
            of_model_V = model(torch.tensor([window])).log_softmax(-1)[0, -1]
        assert new.log_probability == pytest.approx(float(of_model_V[new.token]), abs=1e-9)
        window.append(new.token)


def test_whoever_asked_for_a_sequence_may_end_it_between_two_steps() -> None:
    model, experts = counted_model(**MODEL)
    of = [prompt([1, 2, 3], 8, seed=seed) for seed in (1, 2, 3)]
    generation, undisturbed = Generation(model, of), written(Generation(model, of))
    first = next(generation)
    generation.finish([1, 1, 99])
    del experts.calls[:]
    rest = list(generation)
    assert all(tokens == 2 for _, tokens in experts.calls)
    tokens = [new.token for step in (first, *rest) for new in step if new.sequence == 2]
    assert tokens == undisturbed[2]
    generation.finish([0])
    assert generation.is_done


@pytest.mark.parametrize("failing", [{0}, {1}, {5}, {4, 5, 7, 8}])
@pytest.mark.parametrize("tokens_at_once", [2, 4096])
def test_a_step_that_found_too_few_experts_is_tried_again_without_a_trace(
    failing: set[int], tokens_at_once: int
) -> None:
    undisturbed, _ = counted_model(**MODEL)
    model, experts = counted_model(**MODEL)
    experts.failing = failing
    generation, steps, failures = Generation(model, PROMPTS, tokens_at_once), list[tuple[NewToken, ...]](), 0
    while not generation.is_done:
        try:
            steps.append(next(generation))
        except TooFewExpertsError:
            failures += 1
    assert failures == len(failing)
    assert steps == list(Generation(undisturbed, PROMPTS, tokens_at_once))


def test_a_sequence_that_joins_and_one_that_leaves_change_nothing_that_the_others_say() -> None:
    model, experts = counted_model(**MODEL)
    alone = [written(Generation(model, [of]))[0] for of in PROMPTS]
    generation, found = Generation(model, room=3), dict[int, list[int]]()
    waiting = list(PROMPTS)
    del experts.calls[:]
    while waiting or not generation.is_done:
        if waiting and generation.n_free:  # one more at each step, as places become free
            generation.add(waiting.pop(0))
        for new in next(generation):
            found.setdefault(new.sequence, []).append(new.token)
    assert [found[index] for index in range(len(PROMPTS))] == alone
    assert max(n for layer, n in experts.calls[: 2 * len(PROMPTS)]) > 1, "they shared steps"


def test_a_sequence_more_than_there_is_room_for_is_refused_and_fits_when_another_has_ended() -> None:
    generation = Generation(dense_model(), [prompt([1], 2)], room=1)
    with pytest.raises(LimitExceededError, match="sequences: is 2, but the limit is 1"):
        generation.add(prompt([2], 2))
    list(generation)
    assert generation.n_free == 1
    assert generation.add(prompt([2], 2)) == 1
    assert [new.sequence for step in generation for new in step] == [1, 1]


def test_a_long_prompt_is_read_in_shares_and_keeps_nobody_waiting() -> None:
    model, experts = counted_model(**MODEL)
    generation = Generation(model, [prompt([1], 12)], tokens_at_once=8, room=2)
    next(generation)
    generation.add(prompt(range(CONTEXT - 2), 2))
    del experts.calls[:]
    steps = [tuple(new.sequence for new in next(generation)) for _ in range(5)]
    assert steps == [(0,), (0,), (0,), (0, 1), (0, 1)]
    assert [n for layer, n in experts.calls if layer == 0] == [5, 5, 5, 3, 2]


def test_the_likeliest_tokens_are_told_beside_those_that_are_written() -> None:
    model, window = dense_model(), [1, 2, 3]
    for (new,) in Generation(model, [prompt(window, 4, temperature=2.0, n_likeliest=3)]):
        with torch.no_grad():
            of_model_V = model(torch.tensor([window])).log_softmax(-1)[0, -1]
        values, tokens = of_model_V.topk(3)
        assert [token for token, _ in new.likeliest] == tokens.tolist()
        assert [value for _, value in new.likeliest] == pytest.approx(values.tolist(), abs=1e-9)
        window.append(new.token)
    assert all(new.likeliest == () for step in Generation(model, [prompt([1], 2)]) for new in step)


def test_a_sequence_whose_logits_are_not_finite_is_named_and_the_others_go_on() -> None:
    model = dense_model()
    undisturbed = written(Generation(model, [prompt([1], 6, seed=4)]))[0]
    with torch.no_grad():
        model.embedding_VD[7] = torch.nan
    generation = Generation(model, [prompt([1], 6, seed=4), prompt([7], 6)])
    with pytest.raises(DivergedError, match="logits are not finite") as caught:
        next(generation)
    assert caught.value.sequences == (1,)
    generation.finish(caught.value.sequences)
    assert [new.token for step in generation for new in step] == undisturbed


def test_nothing_asked_for_is_done_at_once() -> None:
    generation = Generation(dense_model(), [prompt([1], 0)])
    assert generation.is_done
    assert list(generation) == []
    assert list(Generation(dense_model(), [])) == []


def test_generation_leaves_the_mode_and_the_gradients_alone() -> None:
    model = dense_model().train()
    written(Generation(model, [prompt([1], 2)]))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "prompt.ids: is empty; it takes at least one token"),
        ([1, 256], "prompt.ids: holds 256; the model knows ids from 0 to 255"),
        ([-1], "prompt.ids: holds -1; the model"),
    ],
)
def test_a_prompt_that_no_model_can_go_on_from_is_refused(ids: list[int], words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Generation(dense_model(), [prompt([1]), prompt(ids)])
    assert words in str(caught.value)


def test_only_what_will_be_written_is_kept_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    per_position = 2 * 2 * 16 * 8
    monkeypatch.setattr("node.model.attention_cache.MAX_CACHE_BYTES", 2 * 4 * per_position)
    for n, is_enough in ((3, True), (4, False)):
        prompts = [prompt([1, 2], n)] * 2
        if is_enough:
            assert len(written(Generation(dense_model(), prompts))) == 2
        else:
            with pytest.raises(LimitExceededError, match="sequences: is 2, but the limit is 1"):
                Generation(dense_model(), prompts)

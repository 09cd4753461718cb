"""A model that keeps what it has read computes what one that reads the whole window again computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import LimitExceededError, TooFewExpertsError
from node.model import attention_cache
from node.model.attention_cache import AttentionCache, Stretch, places_of, read
from tests.support.counted_experts import counted_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.model.transformer import Transformer
    from protocol.manifest import Dtype

CONTEXT = 16
WINDOWS = tuple(
    tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist())
    for length in (16, 11, 7, 1)
)
CODES: dict[str, Any] = {"gate_reads": "tokens", "gate_score": "softmax"}
GATES: dict[str, dict[str, Any]] = {
    "topk": {"gate": "topk"},
    "product keys": {"gate": "product_key"},
    "topk of two heads": {"gate": "topk", "gate_heads": 2},
    "topk by codes": {"gate": "topk", **CODES},
    "product keys by codes of two heads": {"gate": "product_key", "gate_heads": 2, **CODES},
    "hash": {"gate": "hash", **CODES},
    "hash of eight heads": {"gate": "hash", "gate_heads": 8, "experts_per_token": 8, "gate_shortest": 1, **CODES},
}


def stretches(windows: Sequence[Sequence[int]], reads: Sequence[tuple[int, int]]) -> list[Stretch]:
    """One for each window of which something is read."""
    return [
        Stretch(place=place, window=window, start=start, stop=stop)
        for place, (window, (start, stop)) in enumerate(zip(windows, reads, strict=True))
        if start < stop
    ]


def uncached(model: Transformer, window: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits_BTV: torch.Tensor = model(torch.tensor([window]))
    return logits_BTV[0, -1]


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("smear", [0, 2])
@pytest.mark.parametrize("gate", GATES.values(), ids=list(GATES))
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("fp64", 1e-10)])
def test_cached_logits_are_those_of_the_whole_window(
    gate: dict[str, Any], smear: int, heads: int, dtype: Dtype, tolerance: float
) -> None:
    model, _ = counted_model(dtype, **gate, smear=smear, n_heads=heads)
    cache = AttentionCache(model, len(WINDOWS), CONTEXT)
    read_to = [0] * len(WINDOWS)
    # Prompts of different lengths at once, then token by token, as far as each window goes.
    for steps in range(6):
        upto = [min(len(window), max(1, len(window) - 5 + steps)) for window in WINDOWS]
        these = stretches(WINDOWS, list(zip(read_to, upto, strict=True)))
        logits_RV = read(model, cache, these)
        for stretch, logits_V in zip(these, logits_RV, strict=True):
            expected_V = uncached(model, stretch.window[: stretch.stop])
            torch.testing.assert_close(logits_V, expected_V, rtol=0, atol=tolerance)
        read_to = upto
    assert read_to == [16, 11, 7, 1]


SMEARED = {**GATES["hash of eight heads"], "smear": 2}


def test_a_layer_is_called_once_with_the_new_tokens_of_all_sequences_and_nothing_else() -> None:
    model, experts = counted_model(**SMEARED)
    cache = AttentionCache(model, 4, CONTEXT)
    read(model, cache, stretches(WINDOWS, [(0, 12), (0, 5), (0, 7), (0, 1)]))
    assert experts.calls == [(0, 25), (1, 25)]
    read(model, cache, stretches(WINDOWS, [(12, 13), (5, 9), (7, 7), (1, 1)]))
    assert experts.calls[2:] == [(0, 5), (1, 5)]


@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_pass_that_failed_in_any_layer_can_be_repeated(fail_at: int) -> None:
    sound, _ = counted_model(**SMEARED)
    model, experts = counted_model(**SMEARED)
    experts.failing = {2 + fail_at}
    cache, undisturbed = AttentionCache(model, 4, CONTEXT), AttentionCache(sound, 4, CONTEXT)
    first, second = ([(0, 12), (0, 5), (0, 6), (0, 1)], [(12, 16), (5, 6), (6, 7), (1, 1)])
    read(model, cache, stretches(WINDOWS, first))
    with pytest.raises(TooFewExpertsError):
        read(model, cache, stretches(WINDOWS, second))
    again_RV = read(model, cache, stretches(WINDOWS, second))
    read(sound, undisturbed, stretches(WINDOWS, first))
    assert torch.equal(again_RV, read(sound, undisturbed, stretches(WINDOWS, second)))
    for layer in range(2):
        for one, other in zip(cache.of_layer(layer), undisturbed.of_layer(layer), strict=True):
            assert torch.equal(one, other)


def test_a_place_is_read_anew_without_a_trace_of_the_window_before() -> None:
    model, _ = counted_model(**SMEARED)
    cache = AttentionCache(model, 1, CONTEXT)
    for window in WINDOWS:
        found_V = read(model, cache, stretches([window], [(0, len(window))]))[0]
        torch.testing.assert_close(found_V, uncached(model, window), rtol=0, atol=1e-10)


def test_what_is_not_finite_in_one_sequence_stays_there() -> None:
    model, _ = counted_model(gate="hash", **CODES)
    cache = AttentionCache(model, 2, CONTEXT)
    windows = (WINDOWS[0], WINDOWS[1])
    read(model, cache, stretches(windows, [(0, 15), (0, 10)]))
    for layer in range(2):
        for of_layer in cache.of_layer(layer):
            of_layer[0] = torch.nan
    logits_RV = read(model, cache, stretches(windows, [(15, 16), (10, 11)]))
    assert logits_RV[0].isnan().all()
    torch.testing.assert_close(logits_RV[1], uncached(model, windows[1]), rtol=0, atol=1e-10)


def test_places_that_are_kept_move_up_with_all_that_they_have_read() -> None:
    model, _ = counted_model(**SMEARED)
    cache = AttentionCache(model, 4, CONTEXT)
    read(model, cache, stretches(WINDOWS, [(0, 15), (0, 10), (0, 6), (0, 1)]))
    cache.keep([2, 0])
    assert cache.n_sequences == 2
    windows = (WINDOWS[2], WINDOWS[0])
    logits_RV = read(model, cache, stretches(windows, [(6, 7), (15, 16)]))
    for logits_V, window in zip(logits_RV, windows, strict=True):
        torch.testing.assert_close(logits_V, uncached(model, window), rtol=0, atol=1e-10)


def test_a_place_that_is_given_up_is_empty_for_the_next_sequence() -> None:
    model, _ = counted_model(**SMEARED)
    cache = AttentionCache(model, 2, CONTEXT, n_sequences=0)
    assert (cache.add(), cache.add()) == (0, 1)
    with pytest.raises(LimitExceededError, match="sequences: is 3, but the limit is 2"):
        cache.add()
    for layer in range(2):
        for of_layer in cache.of_layer(layer):
            of_layer[1] = torch.nan
    cache.keep([0])
    assert cache.add() == 1
    windows = (WINDOWS[0], WINDOWS[1])
    # The first sequence is longer: what the second has not read yet is looked at, with no weight.
    logits_RV = read(model, cache, stretches(windows, [(0, 16), (0, 3)]))
    torch.testing.assert_close(logits_RV[1], uncached(model, windows[1][:3]), rtol=0, atol=1e-10)


def test_more_sequences_than_memory_is_for_are_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = counted_model("fp32")
    per_sequence = 2 * 2 * CONTEXT * 16 * 4
    with pytest.raises(
        LimitExceededError, match=rf"sequences: is {10**9}, but the limit is {(1 << 32) // per_sequence}"
    ):
        AttentionCache(model, 10**9, CONTEXT)
    monkeypatch.setattr(attention_cache, "MAX_CACHE_BYTES", 3 * per_sequence)
    assert AttentionCache(model, 3, CONTEXT).n_sequences == 3
    with pytest.raises(LimitExceededError, match="the limit is 3"):
        AttentionCache(model, 4, CONTEXT)


@pytest.mark.parametrize(
    ("places", "index"),
    [([0], slice(0, 1)), ([0, 1, 2], slice(0, 3)), ([2, 3], slice(2, 4)), ([0, 2], [0, 2]), ([1, 0], [1, 0])],
)
def test_places_that_follow_each_other_are_a_slice_which_copies_nothing(
    places: list[int], index: slice | list[int]
) -> None:
    assert places_of([Stretch(place=place, window=[1], start=0, stop=1) for place in places]) == index

"""Texts that join and leave a batch while others are written: each as if it were alone, and none for ever."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import (
    ConfigError,
    DivergedError,
    DrainingError,
    InternalError,
    InvalidInputError,
    KilohiveError,
    LimitExceededError,
    OverloadedError,
    TooFewExpertsError,
    UnavailableError,
)
from node.api.batch import BatchLimits, ContinuousBatch
from node.api.written_text import WrittenText
from node.model.generation import Prompt
from node.model.next_token import GenerationConfig
from tests.support.serving import ANSWERED, CONTEXT, PATIENCE_S, running_batch, small_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.api.written_text import Outbox, Piece
    from tests.support.serving import SmallModel


def text(small: SmallModel, prompt: str = "The ", n: int = 12, stop: Sequence[str] = (), **changes: Any) -> WrittenText:
    tokens = list(prompt.encode())
    config = GenerationConfig(max_new_tokens=n, **changes)
    return WrittenText(0, Prompt(ids=tokens, config=config), small.served.tokenizer.stream(), tokens, stop)


async def next_of(outbox: Outbox) -> Piece:
    async with asyncio.timeout(PATIENCE_S):
        piece = await outbox.get()
    if isinstance(piece, KilohiveError):
        raise piece
    return piece


async def rest_of(outbox: Outbox) -> list[Piece]:
    pieces = [await next_of(outbox)]
    while not pieces[-1].finish:
        pieces.append(await next_of(outbox))
    return pieces


async def written(batch: ContinuousBatch, of: WrittenText) -> list[Piece]:
    with batch.writing([of]) as outbox:
        return await rest_of(outbox)


def said(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


async def until_running(batch: ContinuousBatch, n: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while batch.n_running != n:  # noqa: ASYNC110 - another thread's doing
            await asyncio.sleep(0.001)


ASKED: tuple[dict[str, Any], ...] = (
    {"prompt": "The ", "n": 40, "temperature": 0.9, "seed": 1},
    {"prompt": "x" * CONTEXT, "n": 9, "temperature": 0.0},
    {"prompt": "Q", "n": 1, "seed": 2},
    {"prompt": "A city ", "n": 30, "top_k": 20, "seed": 3},
    {"prompt": "12", "n": 20, "top_p": 0.7, "seed": 4},
    {"prompt": "The ", "n": 25, "seed": 1, "n_likeliest": 2},
)


def told(pieces: list[Piece]) -> tuple[str, list[Any]]:
    """The text and its tokens; log-probabilities as far as the order in which sums add up leaves them alike."""
    tokens = [token for piece in pieces for token in piece.tokens]
    return said(pieces), [
        (of.new.token, of.offset, of.new.finish, [(token, round(value, 6)) for token, value in of.new.likeliest])
        for of in tokens
    ]


@pytest.fixture(scope="module")
def alone() -> dict[int, tuple[str, list[Any]]]:
    """What each of ASKED comes to when it is written alone."""
    small = small_model()

    async def one_by_one() -> dict[int, tuple[str, list[Any]]]:
        async with running_batch(small, max_batch=1) as batch:
            return {index: told(await written(batch, text(small, **of))) for index, of in enumerate(ASKED)}

    return asyncio.run(one_by_one())


@given(
    order=st.permutations(range(len(ASKED))),
    max_batch=st.integers(1, 4),
    apart=st.lists(st.integers(0, 5), min_size=len(ASKED), max_size=len(ASKED)),
)
@settings(max_examples=8, deadline=None)
def test_a_text_is_the_same_alone_and_in_any_company(
    alone: dict[int, tuple[str, list[Any]]], order: list[int], max_batch: int, apart: list[int]
) -> None:
    small = small_model()

    async def all_at_once() -> dict[int, tuple[str, list[Any]]]:
        async with running_batch(small, max_batch, max_queue=len(ASKED)) as batch:
            begun = {}
            for index, n_steps in zip(order, apart, strict=True):
                begun[index] = asyncio.create_task(written(batch, text(small, **ASKED[index])))
                until = batch.steps + n_steps
                # The steps are another thread's doing.
                while batch.steps < until and not all(task.done() for task in begun.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            return {index: told(await task) for index, task in begun.items()}

    assert asyncio.run(all_at_once()) == alone


async def test_each_piece_says_who_answered_and_the_last_one_why_it_is() -> None:
    small = small_model()
    async with running_batch(small) as batch:
        pieces = await written(batch, text(small, n=3))
        whole = said(await written(batch, text(small, n=30, temperature=0.0)))
        stop = next(char for char in whole if char.isascii())
        stopped = await written(batch, text(small, n=30, temperature=0.0, stop=[stop]))
    assert [piece.finish for piece in pieces] == [None, None, "length"]
    assert all(piece.answered == ANSWERED for piece in pieces)
    assert stopped[-1].finish == "stop"
    assert said(stopped) == whole.partition(stop)[0]


async def test_a_text_that_nobody_waits_for_makes_room_at_the_next_step() -> None:
    small = small_model()
    async with running_batch(small, max_batch=1) as batch:
        small.here.hold()
        with batch.writing([text(small, n=4096)]), batch.writing([text(small, n=2)]) as outbox:
            pass
        assert batch.n_waiting == 0
        with batch.writing([text(small, n=4096)]) as first:
            second = asyncio.create_task(written(batch, text(small, n=2)))
            small.here.release()
            await next_of(first)
            assert not second.done()
        assert len(await second) == 2
        assert outbox.empty()


async def test_more_than_waits_is_refused_with_a_time_and_what_never_fits_without() -> None:
    small = small_model()
    async with running_batch(small, max_batch=1, max_queue=2) as batch:
        small.here.hold()
        with batch.writing([text(small)]):
            too_many = batch.writing([text(small) for _ in range(3)])
            words = "1 texts are written or wait, 3 are the most"
            with pytest.raises(OverloadedError, match=words) as caught, too_many:
                pass
            assert 1.0 <= caught.value.retry_after_s <= 60.0
            with (
                pytest.raises(LimitExceededError, match="n: is 4, but the limit is 3"),
                batch.writing([text(small)] * 4),
            ):
                pass
            with batch.writing([text(small) for _ in range(2)]) as outbox:
                small.here.release()
                await rest_of(outbox)


@pytest.mark.parametrize("failing", [{0}, {9, 10, 31}])
async def test_hosts_that_come_back_cost_a_text_nothing(failing: set[int]) -> None:
    small, undisturbed = small_model(), small_model()
    small.counted.failing = failing
    async with running_batch(small) as batch, running_batch(undisturbed) as other:
        assert said(await written(batch, text(small))) == said(await written(other, text(undisturbed)))


async def test_while_hosts_are_waited_for_texts_come_and_go() -> None:
    small = small_model()
    small.counted.failing = set(range(100_000))
    async with running_batch(small) as batch:
        with batch.writing([text(small)]) as first:
            await until_running(batch, 1)
            with batch.writing([text(small)]):
                await until_running(batch, 2)
            await until_running(batch, 1)
            small.counted.failing = set()
            assert len(await rest_of(first)) == 12


async def test_hosts_that_stay_away_end_every_text_and_refuse_the_next_until_they_are_back() -> None:
    small = small_model()
    async with running_batch(small, max_batch=1) as batch:
        small.here.hold()
        small.counted.failing, small.here.waits = set(range(100_000)), lambda: False
        with batch.writing([text(small)]) as running, batch.writing([text(small)]) as waiting:
            small.here.release()
            for outbox in (running, waiting):
                with pytest.raises(TooFewExpertsError):
                    await next_of(outbox)
        small.here.live = (3, 0)
        with pytest.raises(UnavailableError, match="29 of 32 experts have no host that answers"):
            await written(batch, text(small))
        small.here.live, small.counted.failing = (3, 1), set()
        assert len(await written(batch, text(small))) == 12


async def test_a_text_whose_logits_are_not_finite_ends_alone() -> None:
    small, undisturbed = small_model(), small_model()
    with torch.no_grad():
        small.served.model.get_parameter("embedding_VD")[ord("~")] = torch.nan
    async with running_batch(small) as batch, running_batch(undisturbed) as other:
        small.here.hold()
        with batch.writing([text(small, "~")]) as bad, batch.writing([text(small, temperature=0.0)]) as good:
            small.here.release()
            with pytest.raises(DivergedError, match="logits are not finite"):
                await next_of(bad)
            assert said(await rest_of(good)) == said(await written(other, text(undisturbed, temperature=0.0)))


async def test_what_fails_for_no_fault_of_a_request_is_told_as_a_failure_of_the_server() -> None:
    small = small_model()

    def refuse(*_: object, keep: bool) -> NoReturn:
        raise InvalidInputError("x of MoE layer 0", "holds NaN or infinity; every entry must be finite")

    async with running_batch(small) as batch:
        small.counted.forward = refuse  # type: ignore[assignment,method-assign]
        with pytest.raises(InternalError, match="a step has failed: x of MoE layer 0: holds NaN"):
            await written(batch, text(small))
        del small.counted.forward
        assert len(await written(batch, text(small))) == 12


async def test_a_stop_ends_what_is_written_and_what_waits_and_refuses_what_comes() -> None:
    small = small_model()
    async with running_batch(small, max_batch=1) as batch:
        with batch.writing([text(small, n=4096)]) as running, batch.writing([text(small)]) as waiting:
            await next_of(running)
            await batch.stop()
            for outbox in (running, waiting):
                with pytest.raises(DrainingError):
                    await rest_of(outbox)
        with pytest.raises(DrainingError), batch.writing([text(small)]):
            pass


async def test_a_bug_in_the_thread_ends_every_text_and_is_told_to_whoever_started_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = small_model()
    small.here.until_enough = lambda step, generation: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    async with running_batch(small) as batch:
        with batch.writing([text(small)]) as outbox, pytest.raises(InternalError, match="its log says how"):
            await next_of(outbox)
        with pytest.raises(ZeroDivisionError):
            await batch.failed
    assert "ZeroDivisionError" in caplog.text
    assert "The " not in caplog.messages


def test_the_cache_bounds_how_many_texts_are_written_at_once(caplog: pytest.LogCaptureFixture) -> None:
    small = small_model()
    per_text = 2 * 2 * CONTEXT * 16 * 8
    limits = BatchLimits(max_batch=8, max_queue=1, cache_bytes=3.5 * per_text)
    assert limits.room(small.served) == 3
    assert "Only 3 texts are written at once" in caplog.text
    assert replace(limits, cache_bytes=1e9).room(small.served) == 8
    with pytest.raises(ConfigError, match="cache_mb: one text of this model takes 1"):
        replace(limits, cache_bytes=per_text - 1).room(small.served)

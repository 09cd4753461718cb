"""What `sample` prints, and when."""

from __future__ import annotations

import asyncio
import io
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import DrainingError, TooFewExpertsError
from common.tokenizer import ByteTokenizer
from node.trainer import sample_command
from node.trainer.config import SampleConfig
from node.trainer.sample_command import Page, run_sample
from node.trainer.sampling import TextPiece
from tests.support.counted_experts import counted_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MODEL: dict[str, Any] = {"gate": "hash", "gate_reads": "tokens", "gate_score": "softmax", "smear": 2}


def piece(index: int, text: str, *, is_last: bool = False) -> TextPiece:
    return TextPiece(index=index, text=text, is_last=is_last)


def test_one_text_is_shown_as_it_comes_and_ends_its_line() -> None:
    out = io.StringIO()
    page = Page(out, 1)
    shown = []
    for step in (piece(0, "The "), piece(0, "ci"), piece(0, ""), piece(0, "ty\n", is_last=True)):
        page.add([step])
        shown.append(out.getvalue())
    page.end_line()
    assert shown == ["The ", "The ci", "The ci", "The city\n\n"]
    assert out.getvalue() == shown[-1]


def test_several_texts_are_numbered_and_each_waits_for_its_turn() -> None:
    out = io.StringIO()
    page = Page(out, 3)
    page.add([piece(0, "A"), piece(1, "A"), piece(2, "A")])
    page.add([piece(0, "b"), piece(1, "c", is_last=True), piece(2, "d")])
    assert out.getvalue() == "[1 of 3]\nAb"
    page.add([piece(0, "e", is_last=True), piece(2, "f")])
    assert out.getvalue() == "[1 of 3]\nAbe\n[2 of 3]\nAc\n[3 of 3]\nAdf"
    page.end_line()
    assert out.getvalue().endswith("Adf\n")


def test_what_a_terminal_would_obey_is_not_written_to_it() -> None:
    out = io.StringIO()
    Page(out, 1).add([piece(0, "\x1b[31m:smile:\t[b]\r\x00\n", is_last=True)])
    assert out.getvalue() == "·[31m:smile:·[b]··\n\n"


class Sample:
    """`run_sample` over experts in this process, whose dispatcher is a fake."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.experts = counted_model(**MODEL)
        self.on_wait: Callable[[], None] = lambda: None
        monkeypatch.setattr(sample_command, "text_model", self._text_model)

    @asynccontextmanager
    async def _text_model(self, config: SampleConfig, stop: asyncio.Event) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(model=self.model, dispatcher=self, tokenizer=ByteTokenizer())

    @property
    def manifest(self) -> Any:
        return self.experts.manifest

    def live_experts(self, layer: int) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.bool)

    def wait_for_change(self, timeout_s: float) -> None:
        self.on_wait()


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Sample:
    return Sample(monkeypatch)


async def printed(capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    await run_sample(SampleConfig(**settings), asyncio.Event())
    return capsys.readouterr().out


async def test_the_text_follows_the_prompt_and_repeats_with_the_seed(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    first = await printed(capsys, prompt="A city ", n_tokens=20)
    assert first.startswith("A city ")
    assert first.endswith("\n")
    assert len(first) > len("A city \n")
    assert first == await printed(capsys, prompt="A city ", n_tokens=20)
    assert first != await printed(capsys, prompt="A city ", n_tokens=20, seed=1)


async def test_each_of_several_texts_is_the_one_of_its_own_seed(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [await printed(capsys, n_tokens=12, seed=seed, top_k=9, top_p=0.9) for seed in (5, 6, 7)]
    together = await printed(capsys, n_tokens=12, seed=5, n=3, top_k=9, top_p=0.9)
    assert together == "".join(f"[{index + 1} of 3]\n{text}" for index, text in enumerate(alone))


async def test_a_text_ends_before_its_stop(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    whole = await printed(capsys, prompt="", n_tokens=60, temperature=0.0)
    stop = next(char for char in whole if char.isascii())
    found = await printed(capsys, prompt="", n_tokens=60, temperature=0.0, stop=("no such text", stop))
    assert found == whole.partition(stop)[0] + "\n"


async def test_hosts_that_fail_in_mid_sentence_cost_nothing_but_time(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = await printed(capsys, n_tokens=20)
    del sample.experts.calls[:]
    sample.experts.failing = {0, 9, 10, 31}
    assert await printed(capsys, n_tokens=20) == undisturbed


async def test_hosts_that_stay_away_end_the_line_and_say_what_to_do(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = await printed(capsys, n_tokens=20)
    del sample.experts.calls[:]
    sample.experts.failing = set(range(10, 100_000))
    with pytest.raises(TooFewExpertsError, match=r"32 of 32 experts have no host .* after a wait of 0 s .*start hosts"):
        await run_sample(SampleConfig(n_tokens=20, wait_for_experts_s=0.0), asyncio.Event())
    out = capsys.readouterr().out
    assert len(out) > len("The \n")
    assert out.endswith("\n")
    assert undisturbed.startswith(out[:-1])


async def test_a_stop_in_mid_sentence_ends_the_line_and_is_no_error(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    stop, loop, left = asyncio.Event(), asyncio.get_running_loop(), threading.Event()

    def interrupted() -> None:
        loop.call_soon_threadsafe(stop.set)
        assert left.wait(10)
        raise DrainingError("this trainer is leaving")

    sample.experts.failing, sample.on_wait = {4}, interrupted
    await run_sample(SampleConfig(n_tokens=20), stop)
    left.set()
    out = capsys.readouterr().out
    assert out.startswith("The ")
    assert out.endswith("\n")


async def test_a_swarm_that_is_lost_is_an_error(sample: Sample) -> None:
    def lost() -> None:
        raise DrainingError("this trainer is leaving")

    sample.experts.failing, sample.on_wait = {4}, lost
    with pytest.raises(DrainingError):
        await run_sample(SampleConfig(n_tokens=20), asyncio.Event())

"""`sample`: a trained model writes text, which is shown as it is made."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from common.errors import ConfigError, DrainingError
from common.settings import check_minimums
from common.tasks import until_stopped
from common.text import printable
from node.model.next_token import GenerationConfig
from node.trainer.host_wait import PatientWait
from node.trainer.sampling import TextWriter
from node.trainer.trained_model import text_model

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

    from node.trainer.config import SampleConfig
    from node.trainer.sampling import TextPiece, UntilEnough
    from node.trainer.trained_model import TextModel

MAX_TEXTS = 1024

MINIMUMS = {
    "n_tokens": 0,
    "temperature": 0,
    "top_k": 0,
    "n": 1,
    "threads": 1,
    "join_timeout_s": 0.1,
    "wait_for_experts_s": 0,
}


async def run_sample(config: SampleConfig, stop: asyncio.Event) -> None:
    """Print the prompt and what the model writes after it, as it comes.

    Raises:
        ConfigError: a setting is out of its range.
        TooFewExpertsError: hosts were gone for longer than they are waited for; what was written is printed.
    """
    _check(config)
    try:
        async with text_model(config, stop) as trained:
            await _write(trained, config, stop)
    except DrainingError:
        if not stop.is_set():
            raise


def _check(config: SampleConfig) -> None:
    check_minimums(config, MINIMUMS)
    if config.n > MAX_TEXTS:
        raise ConfigError(f"--n: must be at most {MAX_TEXTS}, is {config.n}")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"--top-p: must be more than 0 and at most 1, is {config.top_p:g}")
    if not all(config.stop):
        raise ConfigError("--stop: is empty, which would end every text at once; leave it out")
    if any(_bytes_of(stop) != stop.encode("utf-8", "replace") for stop in config.stop):
        raise ConfigError("--stop: is not UTF-8, so no text ever comes to it")


async def _write(trained: TextModel, config: SampleConfig, stop: asyncio.Event) -> None:
    """Compute on other threads, a step at a time; DrainingError as soon as `stop` is set."""
    page, until_enough = Page(sys.stdout, config.n), _until_enough(trained, config)
    of_all = GenerationConfig(
        max_new_tokens=config.n_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
    )
    prompts = [(_bytes_of(config.prompt), replace(of_all, seed=config.seed + index)) for index in range(config.n)]
    steps = iter(TextWriter(trained.model, trained.tokenizer, prompts, until_enough, config.stop))
    try:
        while (pieces := await until_stopped(asyncio.to_thread(next, steps, None), stop)) is not None:
            page.add(pieces)
    finally:
        page.end_line()


def _until_enough(trained: TextModel, config: SampleConfig) -> UntilEnough:
    if trained.dispatcher is None:
        return lambda function, item: function(item)
    return PatientWait(trained.dispatcher, config.wait_for_experts_s).until_enough


def _bytes_of(text: str) -> bytes:
    """What was typed, which need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


class Page:
    """Texts one after the other, each as it comes, as terminals may show them; several are numbered.

    What comes of a text before its turn waits for it.
    """

    def __init__(self, out: TextIO, n_texts: int) -> None:
        self._out = out
        self._waiting = [""] * n_texts
        self._is_whole = [False] * n_texts
        self._at = 0
        self._in_line = False

    def add(self, pieces: Iterable[TextPiece]) -> None:
        """Show what has its turn."""
        for piece in pieces:
            self._waiting[piece.index] += printable(piece.text)
            self._is_whole[piece.index] = piece.is_last
        while self._at < len(self._waiting):
            self._show()
            if not self._is_whole[self._at]:
                break
            self.end_line()
            self._at += 1

    def end_line(self) -> None:
        """End the line of a text that was begun."""
        if self._in_line:
            self._put("\n")
            self._in_line = False

    def _show(self) -> None:
        if not self._in_line and len(self._waiting) > 1:
            self._put(f"[{self._at + 1} of {len(self._waiting)}]\n")
        self._in_line = True
        self._put(self._waiting[self._at])
        self._waiting[self._at] = ""

    def _put(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

"""The thread that writes: texts of all requests in one batch, which they join and leave between two steps.

Path of a request: app -> asked -> **batch** -> generation -> attention_cache -> transformer -> experts, and back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import (
    ConfigError,
    DivergedError,
    DrainingError,
    InternalError,
    KilohiveError,
    LimitExceededError,
    OverloadedError,
    TooFewExpertsError,
    UnavailableError,
)
from node.model.attention_cache import MAX_CACHE_BYTES
from node.model.generation import Generation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from node.api.served_model import ServedModel
    from node.api.written_text import Outbox, Piece, WrittenText
    from node.trainer.sampling import NewTokens

    News = list[tuple[Outbox, Piece | KilohiveError]]

logger = logging.getLogger(__name__)

JOIN_S = 2.0
MAX_RETRY_AFTER_S = 60.0
LATEST = 0.2
"""Weight of the latest text in the mean time that a text takes."""
LEAVING = "this server is stopping"


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How many texts are written at once, and how many wait for that; bytes of their keys and values."""

    max_batch: int
    max_queue: int
    cache_bytes: float

    def room(self, served: ServedModel) -> int:
        """How many texts are written at once; ConfigError if the cache is too small for one."""
        per_text = served.model.bytes_per_sequence(served.model.context)
        room = min(self.max_batch, int(min(self.cache_bytes, MAX_CACHE_BYTES)) // per_text)
        if room < 1:
            needed = math.ceil(per_text / 1e6)
            raise ConfigError(f"cache_mb: one text of this model takes {needed:,}, more than there is; give it more")
        if room < self.max_batch:
            logger.warning("Only %d texts are written at once: more take more memory than cache_mb is", room)
        return room


class ContinuousBatch:
    """Writes texts that are submitted, on a thread of its own between `start` and `stop`, in the order they came in.

    Built, started, submitted to and stopped on one event loop, to which the pieces go.
    `failed` is set to the error that ended the thread, if one did: it is a fault of this program.
    """

    def __init__(self, served: ServedModel, limits: BatchLimits) -> None:
        self._served, self._limits = served, limits
        self.room = limits.room(served)
        self._generation = Generation(served.model, room=self.room)
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._changed = threading.Condition()
        self._waiting: deque[WrittenText] = deque()
        self._running: dict[int, tuple[WrittenText, float]] = {}
        self._is_stopping = self._has_given_up = False
        self._thread = threading.Thread(target=self._run, name="kilohive-generation")
        self._seconds_per_text = 1.0
        self.tokens_read = self.tokens_written = self.steps = 0

    @property
    def n_waiting(self) -> int:
        """Texts that wait for their turn."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Texts that are being written."""
        return len(self._running)

    @property
    def most(self) -> int:
        """How many texts are written or wait at most."""
        return self.room + self._limits.max_queue

    def check_fits(self, n_texts: int) -> None:
        """Raise LimitExceededError for a request of more texts than ever fit."""
        if n_texts > self.most:
            raise LimitExceededError("n", n_texts, self.most, "texts, one for each prompt and choice")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; whoever waits for a piece gets DrainingError. Safe to call twice, or before `start`."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._served.experts.close()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, JOIN_S)
        # The thread may still be in a long product: what is its own is left to it.
        texts = [*self._waiting, *(text for text, _ in list(self._running.values()))]
        self._tell([(text.outbox, DrainingError(LEAVING)) for text in texts])

    @contextmanager
    def writing(self, texts: Sequence[WrittenText]) -> Iterator[Outbox]:
        """Where the pieces of all `texts` come, or the error that ends them all. When the context ends, so do they.

        Raises:
            LimitExceededError: so many never fit.
            OverloadedError: so many do not fit now; says when to try again.
            UnavailableError: too many experts have been away for too long; says how many.
            DrainingError: the server is stopping.
        """
        outbox: Outbox = asyncio.Queue()
        for text in texts:
            text.outbox = outbox
        self._submit(texts)
        try:
            yield outbox
        finally:
            self._cancel(texts)

    def _submit(self, texts: Sequence[WrittenText]) -> None:
        self.check_fits(len(texts))
        self._check_experts()
        limit = self.most
        with self._changed:
            if self._is_stopping:
                raise DrainingError(LEAVING)
            n_before = self.n_waiting + self.n_running
            if n_before + len(texts) > limit:
                raise OverloadedError(f"{n_before} texts are written or wait, {limit} are the most", self._retry_s())
            self._waiting.extend(texts)
            self._changed.notify_all()

    def _check_experts(self) -> None:
        """Once hosts were waited for in vain nobody else waits for them, until they are back."""
        if self._has_given_up:
            count = self._served.experts.count()
            if not count.is_enough:
                raise UnavailableError(f"{count}; a text needs at least one in every layer")
            self._has_given_up = False

    def _retry_s(self) -> float:
        """Until there is room for one more text, going by how long texts took of late (seconds)."""
        return min(MAX_RETRY_AFTER_S, max(1.0, self._seconds_per_text * (self.n_waiting + 1) / self.room))

    def _cancel(self, texts: Sequence[WrittenText]) -> None:
        with self._changed:
            for text in texts:
                text.is_cancelled = True
            self._waiting = deque(text for text in self._waiting if not text.is_cancelled)

    def _run(self) -> None:
        try:
            while self._has_work():
                self._step()
        except BaseException as error:  # the thread's boundary: whoever waits, and whoever started it, must hear of it
            logger.exception("The thread that writes has failed")
            self._end_with(error)

    def _end_with(self, error: BaseException) -> None:
        with self._changed:
            self._is_stopping = True
        self._tell(self._fail_all(InternalError("the server has failed; its log says how")))
        self._loop.call_soon_threadsafe(self.failed.set_exception, error)

    def _has_work(self) -> bool:
        """Wait for some; False when the server stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or self._waiting or self._running)
            return not self._is_stopping

    def _step(self) -> None:
        try:
            new = self._served.experts.until_enough(self._attempt, self._generation)
        except DrainingError:
            self._tell(self._fail_all(DrainingError(LEAVING)))
        except TooFewExpertsError as error:
            self._has_given_up = True
            self._tell(self._fail_all(error))
        except DivergedError as error:
            self._tell(self._fail(error.sequences, error))
        except KilohiveError as error:
            # Whatever it says is wrong, no request is to blame for it.
            logger.warning("A step of %d texts has failed: %s", self.n_running, error)
            self._tell(self._fail(list(self._running), InternalError(f"a step has failed: {error}")))
        else:
            self.steps += 1
            self._tell(self._pieces(new))

    def _attempt(self, generation: Generation) -> NewTokens:
        """A step of whoever is there: also while hosts are waited for, texts are dropped and come in."""
        with self._changed:
            if self._is_stopping:
                raise DrainingError(LEAVING)
            self._drop([index for index, (text, _) in self._running.items() if text.is_cancelled])
            while self._waiting and generation.n_free:
                text = self._waiting.popleft()
                self._running[generation.add(text.prompt)] = (text, time.monotonic())
                self.tokens_read += len(text.prompt.ids)
        return next(generation, ())

    def _drop(self, indices: Sequence[int]) -> None:
        self._generation.finish(indices)
        for index in indices:
            del self._running[index]

    def _pieces(self, new_tokens: NewTokens) -> News:
        answered = self._served.experts.take_answered()
        news: News = []
        ended = []
        for new in new_tokens:
            text, since_s = self._running[new.sequence]
            piece = text.take(new, answered)
            news.append((text.outbox, piece))
            if piece.finish:
                ended.append(new.sequence)
                self._seconds_per_text += LATEST * (time.monotonic() - since_s - self._seconds_per_text)
        with self._changed:
            self.tokens_written += len(new_tokens)
            self._drop(ended)
        return news

    def _fail(self, indices: Sequence[int], error: KilohiveError) -> News:
        with self._changed:
            news: News = [(self._running[index][0].outbox, error) for index in indices]
            self._drop(indices)
        return news

    def _fail_all(self, error: KilohiveError) -> News:
        with self._changed:
            waiting: News = [(text.outbox, error) for text in self._waiting]
            self._waiting.clear()
        return waiting + self._fail(list(self._running), error)

    def _tell(self, news: News) -> None:
        if news:
            self._loop.call_soon_threadsafe(_put, news)


def _put(news: News) -> None:
    for outbox, item in news:
        outbox.put_nowait(item)

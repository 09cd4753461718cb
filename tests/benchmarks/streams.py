"""Streams of completions over HTTP as a client has them: the first token's time, the rate, and what they cost."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RATE: Final = "tokens/s"
FIRST: Final = "first token, ms"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one round of streams: the mean time to a stream's first token (seconds), and the tokens per second of all."""

    first_s: float
    rate: float


class Contender:
    """Rounds of `n_tokens` tokens, one for each call; `meters` say what processor time somebody has taken so far."""

    def __init__(
        self, run: Callable[[], Timing], n_tokens: int, meters: Mapping[str, Callable[[], float]] | None = None
    ) -> None:
        self._run, self._n_tokens, self._meters = run, n_tokens, meters or {}
        self._rounds = list[dict[str, float]]()

    def __call__(self) -> float:
        """Run one round; return its tokens per second."""
        before_s = {name: meter() for name, meter in self._meters.items()}
        timing = self._run()
        taken = {name: 1e3 * (meter() - before_s[name]) / self._n_tokens for name, meter in self._meters.items()}
        self._rounds.append({RATE: timing.rate, FIRST: 1e3 * timing.first_s, **taken})
        return timing.rate

    def figures(self, metric: str) -> list[float]:
        """What every round but the first one, the warm-up, came to; of a meter in milliseconds for each token."""
        return [of_round[metric] for of_round in self._rounds[1:]]


def over_http(url: str, prompts: Sequence[Sequence[int]], n_tokens: int) -> Timing:
    """One greedy stream for each prompt, which all begin together."""
    return asyncio.run(_over_http(url, prompts, n_tokens))


async def _over_http(url: str, prompts: Sequence[Sequence[int]], n_tokens: int) -> Timing:
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:  # noqa: S113 - a round ends by itself
        started_s = time.perf_counter()
        firsts_s = await asyncio.gather(*(_stream(client, prompt, n_tokens) for prompt in prompts))
        took_s = time.perf_counter() - started_s
    return Timing(first_s=statistics.mean(firsts_s), rate=len(prompts) * n_tokens / took_s)


async def _stream(client: httpx.AsyncClient, prompt: Sequence[int], n_tokens: int) -> float:
    """Read a stream to its end over a connection of its own; seconds to its first token.

    That may be a part of a character: each token has a chunk. SystemExit where one is missing.
    """
    fields = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": True, "kilohive": True}
    arrived_s, started_s = list[float](), time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=fields) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                if "kilohive" not in json.loads(line[6:]):
                    raise SystemExit(f"a stream has failed: {line}")
                arrived_s.append(time.perf_counter() - started_s)
    if len(arrived_s) != n_tokens:
        raise SystemExit(f"a stream has {len(arrived_s)} of {n_tokens} tokens")
    return arrived_s[0]

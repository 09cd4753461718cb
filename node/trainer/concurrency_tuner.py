"""How many micro-batches of a step are in flight at once: sought by trying, while training goes on.

It depends on the network, the hosts and this machine, all of which change. More hide longer waits, and each holds its
activations in memory, so the fewest that are as fast as more are wanted. All of a step's are the start: too many cost
memory, too few cost a wait for every one of them.
"""

from __future__ import annotations

ROUND_STEPS = 3
"""Steps with the same number, of which the mean speed counts: single steps differ by chance."""

FEWEST = 2
"""The fewest in flight: with one, nothing is computed while it waits."""

NO_LOSS, GAIN = 0.99, 1.03
"""Relative speed from which fewer, or more, are kept."""

FIRST_REST_ROUNDS = 8
"""Rounds before the first try: hosts and caches are still warming up, and memory is not short yet."""

MOST_REST_ROUNDS = 16
"""Longest rest after a try that changed nothing; a rest doubles each time."""


class ConcurrencyTuner:
    """`in_flight` is at most `most`, the micro-batches of a step; with `fixed` it is that, and nothing is tried."""

    def __init__(self, most: int, fixed: int = 0) -> None:
        self._most, self._seeks = most, not fixed and most > FEWEST
        self.in_flight = min(fixed, most) if fixed else most
        self._chosen, self._speed = self.in_flight, 0.0
        self._up = False
        self._rest, self._rounds_left = 1, FIRST_REST_ROUNDS
        self._speeds: list[float] = []

    def learn(self, tokens_per_s: float) -> None:
        """A step has ended."""
        self._speeds.append(tokens_per_s)
        if self._seeks and len(self._speeds) == ROUND_STEPS:
            speed = sum(self._speeds) / ROUND_STEPS
            self._speeds = []
            if self.in_flight == self._chosen:
                self._hold(speed)
            else:
                self._judge(speed)

    def _hold(self, speed: float) -> None:
        self._speed = speed
        self._rounds_left -= 1
        if self._rounds_left <= 0:
            self.in_flight = self._candidate()

    def _candidate(self) -> int:
        other = min(2 * self._chosen, self._most) if self._up else max(self._chosen // 2, FEWEST)
        if other == self._chosen:  # at an end: the way back is the only one
            self._up = not self._up
            return self._candidate()
        return other

    def _judge(self, speed: float) -> None:
        if speed >= self._speed * (GAIN if self._up else NO_LOSS):
            self._chosen, self._speed, self._rest = self.in_flight, speed, 1
        else:
            self._up = not self._up
            self._rest = min(2 * self._rest, MOST_REST_ROUNDS)
        self.in_flight, self._rounds_left = self._chosen, self._rest

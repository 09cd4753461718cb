"""What the page shows, made of what a host told: a sentence about now, and rates over the last seconds. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from common.text import count_text, moment_text

if TYPE_CHECKING:
    from node.host.page.credit import CreditFigures

    Told = dict[str, Any]

WINDOW_S: Final = 10.0
"""Rates are means over so many seconds: a host works in bursts."""

IDLE_TOKENS_PER_S: Final = 0.5
REACHED: Final = {
    "reached": "Others call it directly.",
    "relayed": "Others call it through a relay.",
    "not reached": "Others cannot call it.",
    "unknown": "Whether others can call it is not known yet.",
}
ENDED: Final = "The host of this machine does not run, or does not answer."


class RateWindow:
    """What a host takes per second, of counts that it told at different moments."""

    def __init__(self) -> None:
        self._started_s = 0.0
        self._counts: deque[tuple[float, dict[str, float]]] = deque()

    def add(self, told: Told) -> None:
        """Take in what a host told; another one, or a clock that was set back, begins anew."""
        now_s, counts = float(told["now_s"]), self._counts
        if told["started_s"] != self._started_s or (counts and now_s <= counts[-1][0]):
            counts.clear()
            self._started_s = told["started_s"]
        counts.append((now_s, {name: float(told["use"][name]) for name in ("cpu_s", "sent_bytes", "received_bytes")}))
        while now_s - counts[0][0] > WINDOW_S and len(counts) > 2:  # noqa: PLR2004 - a rate is of two
            counts.popleft()

    def per_s(self, name: str) -> float | None:
        """How fast a count grows; None until that is known."""
        if len(self._counts) < 2:  # noqa: PLR2004 - as above
            return None
        (began_s, first), (now_s, last) = self._counts[0], self._counts[-1]
        return max(0.0, last[name] - first[name]) / (now_s - began_s)


def page_state(told: Told, rates: RateWindow, credit: CreditFigures | None, act_key: str) -> Told:
    """All that the page is sent of a host that answers; `act_key` is what it says with each action."""
    cores = rates.per_s("cpu_s")
    return {
        **told,
        "problem": "",
        "sentence": sentence(told),
        "reached": REACHED.get(told["reachability"], REACHED["unknown"]),
        "rates": {
            "cpu_percent": None if cores is None else 100.0 * cores,
            "up_bytes_per_s": rates.per_s("sent_bytes"),
            "down_bytes_per_s": rates.per_s("received_bytes"),
        },
        "credit": None if credit is None else asdict(credit),
        "act_key": act_key,
    }


def silent_state(problem: str) -> Told:
    """What the page is sent while no host answers."""
    return {"problem": problem, "sentence": ENDED}


def sentence(told: Told) -> str:
    """What the machine does right now."""
    availability, held = told["availability"], told["held"]
    if availability["leaving"]:
        return "This machine hands its blocks over and leaves the run."
    if availability["reasons"]:
        return _paused(availability)
    if not held["serving"]:
        return (
            f"This machine fetches its first blocks: {_counted(held['joining'], 'block')} on the way."
            if held["joining"]
            else "This machine has joined the run and holds no block yet."
        )
    what = f"This machine serves {_counted(held['experts'], 'expert')} in {_counted(held['serving'], 'block')}"
    per_s = told["work"]["tokens_per_s"]
    if per_s < IDLE_TOKENS_PER_S:
        return f"{what}, and nobody asks for them right now."
    return f"{what}, and answers {count_text(per_s)} tokens per second."


def _paused(availability: Told) -> str:
    until_s = availability["until_s"]
    until = "" if until_s is None else f" until {moment_text(until_s)}"
    reasons = " and ".join(reason["why"] for reason in availability["reasons"])
    doing = "is paused" if availability["away"] else "gives its blocks up to pause"
    return f"This machine {doing}{until}: {reasons}."


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"

"""What `pause`, `resume` and `leave` say to a running host: signals, which only the node's own user can send."""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from node.host.availability import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from node.host.availability import Availability
    from node.host.owner_pause import OwnerPause

SIGNALS = {"pause": signal.SIGUSR1, "resume": signal.SIGUSR2, "leave": signal.SIGQUIT}


@contextmanager
def signals_heard(availability: Availability, owner: OwnerPause, tell: Callable[[str], None]) -> Iterator[None]:
    """Obey them while the context lasts; `tell` hears each word. For the main thread's event loop."""
    loop = asyncio.get_running_loop()

    def obey(word: str) -> None:
        if word == "leave":
            availability.leave.set()
        else:
            (owner.begin if word == "pause" else owner.end)()
            availability.tell(Reason.OWNER, owner.look().against, owner.until_s)
        tell(word)

    for word, number in SIGNALS.items():
        loop.add_signal_handler(number, obey, word)
    try:
        yield
    finally:
        for number in SIGNALS.values():
            loop.remove_signal_handler(number)

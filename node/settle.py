"""Running a function for somebody who waits for it in another thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

R = TypeVar("R")


def settle(future: Future[R], function: Callable[[], R]) -> None:
    """Run `function` and give `future` what it returns or raises; nothing runs if `future` was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # noqa: BLE001 - task boundary: the error belongs to whoever waits, and must reach him
        future.set_exception(error)

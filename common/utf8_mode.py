"""Start again in Python's UTF-8 mode where the locale cannot read the path that this program is installed in.

torch takes its own path for UTF-8, and ends in a trace where the locale's encoding has made something else of it.
"""

from __future__ import annotations

import os
import sys

UTF8_MODE = "PYTHONUTF8"


def start_again_if_needed() -> None:
    """Replace this process by the same one in UTF-8 mode; return where there is no need, or where that did not help."""
    if is_readable(sys.prefix) and is_readable(__file__):
        return
    if os.environ.get(UTF8_MODE) == "1":
        return
    # What is printed stays in the terminal's encoding.
    encoding = sys.stdout.encoding if sys.stdout is not None else "utf-8"
    environment = {"PYTHONIOENCODING": encoding, **os.environ, UTF8_MODE: "1"}
    os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606 - this very program


def is_readable(path: str) -> bool:
    """Whether `path` is text, rather than bytes that the locale's encoding does not have."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

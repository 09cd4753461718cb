"""Standard input, output and error: made so, at the start of a process, that nothing which prints can fail by it.

Whoever reads the output may leave (`| head`, a terminal that is closed): what is written from then on goes nowhere, and
the work goes on to its end. A stream that was closed before the start (`>&-`) is /dev/null. A character that the
terminal's encoding does not have becomes a question mark.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import threading
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = 0, 1, 2
READER_LEFT = frozenset({errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN})
"""A pipe or a socket without its other end, or a terminal (EIO) that was closed."""

RAISING = frozenset({"strict", "surrogateescape"})
"""Ways to treat a character without an encoding that end in an error for some."""


class OutputFile(io.FileIO):
    """A descriptor to which writing never fails.

    `lost`: why some of the output is missing, unless its reader has left.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of it, or nowhere if nobody reads any more."""
        rest = whole = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError as error:
            self._fail(error)
        return len(whole)

    def _write_some(self, data: memoryview) -> int:
        written = super().write(data)
        if written is None:  # another program has made the pipe one that does not block
            select.select([], [self], [])
        return written or 0

    def _fail(self, error: OSError) -> None:
        if error.errno not in READER_LEFT:  # a full disk, which may have room again for the next line
            self.lost = error
            return
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # for libraries and child processes too, which write without asking us
        os.close(null)


def open_standard_streams() -> OutputFile:
    """Make the process's three streams safe to use, before anything else is opened; returns standard output."""
    for descriptor in (STDIN, STDOUT, STDERR):
        _open_if_closed(descriptor)
    output = OutputFile(STDOUT)
    sys.stdin = sys.stdin or open(STDIN, closefd=False, encoding="utf-8")  # noqa: SIM115 - the process's, to its end
    sys.stdout = _text(output, sys.stdout)
    sys.stderr = _text(OutputFile(STDERR), sys.stderr)
    return output


def watch_stdin(at_its_end: Callable[[], object]) -> None:
    """Call `at_its_end`, in a thread of its own, once standard input ends."""
    threading.Thread(target=_read_to_the_end, args=(at_its_end,), name="stdin", daemon=True).start()


def _read_to_the_end(at_its_end: Callable[[], object]) -> None:
    """A thread, as an event loop cannot wait for a file or a terminal without changing it for its other users."""
    with contextlib.suppress(OSError):  # standard input was closed: its end too
        while os.read(STDIN, 4096):
            pass
    with contextlib.suppress(RuntimeError):  # the role has ended and so has its loop
        at_its_end()


def _open_if_closed(descriptor: int) -> None:
    """Otherwise the next file or socket that is opened would get the number, and what is printed."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDONLY if descriptor == STDIN else os.O_WRONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)  # noqa: FBT003 - the name of os's parameter


def _text(output: OutputFile, before: TextIO | None) -> TextIO:
    """A text stream as `before`, which writes at once."""
    encoding = before.encoding if before is not None else "utf-8"
    errors = before.errors if before is not None else None
    if errors is None or errors in RAISING:
        errors = "replace"
    return io.TextIOWrapper(output, encoding=encoding, errors=errors, write_through=True)

"""What is shown while a corpus is read for the first time. Before the path of a step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.progress import progress_shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from node.data.sources import Corpus

SHOWN_AFTER_S = 2.0


@contextmanager
def reading_shown(corpus: Corpus) -> Iterator[Callable[[int], None]]:
    """Give what is to be told how many bytes of text have been read."""
    n_bytes = sum(size for _, size, _ in corpus.file_stamps)
    with progress_shown(n_bytes, SHOWN_AFTER_S) as tell:
        yield lambda done: tell(done, f"reading {corpus.title}: {done / 1e6:.0f} MB")

"""What a trial of an experiment is given, in this process, and a small text for it to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.data import open_dataset

if TYPE_CHECKING:
    from pathlib import Path

    from node.data import ByteDataset


@dataclass
class Context:
    """A trial's context, which counts what it is told."""

    folder: Path
    device: str = "cpu"
    told: int = 0

    def __post_init__(self) -> None:
        self.shared = self.folder

    def progress(self, done: float, total: float, words: str) -> None:
        assert 0 <= done <= total
        assert words
        self.told += 1


def bee_dataset(folder: Path) -> ByteDataset:
    """Two thousand short documents, a third of them held out."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Bee number {n} flies to flower {n * n % 97}." for n in range(2000)))
    return open_dataset(text, cache_dir=folder / "cache", held_out_fraction=0.3)

"""What a trial of an experiment is given, in this process, and a small text for it to learn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.data import open_dataset

if TYPE_CHECKING:
    from pathlib import Path

    from node.data import TextDataset


@dataclass
class Context:
    """A trial's context, which counts what it is told. Trials with folders in one folder share another one there."""

    folder: Path
    device: str = "cpu"
    told: int = 0

    def __post_init__(self) -> None:
        self.shared = self.folder.parent / "shared"
        for folder in (self.folder, self.shared):
            folder.mkdir(parents=True, exist_ok=True)

    def progress(self, done: float, total: float, words: str) -> None:
        assert 0 <= done <= total
        assert words
        self.told += 1


def bee_dataset(folder: Path) -> TextDataset:
    """Two thousand short documents, a third of them held out."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Bee number {n} flies to flower {n * n % 97}." for n in range(2000)))
    return open_dataset(text, cache_dir=folder / "cache", held_out_fraction=0.3)


def topical_dataset(folder: Path) -> TextDataset:
    """Sixteen hundred articles as the default corpus has them, on four topics, each with words of its own."""
    words = {"Bees": ("hive", "queen"), "Stars": ("orbit", "moon"), "Ships": ("sail", "deck"), "Bread": ("rye", "oven")}
    topics = [(topic, words[topic][n % 2], n) for n in range(400) for topic in words]
    records = {
        f"{topic} {n}": {"extract": f"{topic} number {n} has {word}, and {word} again.", "topic": topic}
        for topic, word, n in topics
    }
    path = folder / "articles.json"
    path.write_text(json.dumps(records))
    return open_dataset(path, cache_dir=folder / "cache")

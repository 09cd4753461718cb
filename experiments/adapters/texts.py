"""Writes the texts of `experiment adapters` in which its seed is weak as a folder that `--data` takes.

    python -m experiments.adapters.texts --out texts --documents 200

Of each domain as many documents, of about 2,000 characters, chosen with a fixed seed: JSON lines with a field `text`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.folders import prepare_folder
from experiments.adapters.domains import WEAK, read_domain

SEED = 0


@dataclass(frozen=True, kw_only=True)
class TextsConfig:
    """Write the texts in which the seed of `experiment adapters` is weak."""

    out: Path = Path("texts")
    """Write them to this folder."""
    documents: int = 200
    """Write this many documents of each domain."""


def write_texts(config: TextsConfig) -> None:
    """One file for each domain. Raises DataError where a text is not installed."""
    prepare_folder(config.out)
    for name in WEAK:
        documents = read_domain(name).training
        chosen = random.Random(SEED).sample(documents, min(config.documents, len(documents)))
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen)
        (config.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write_texts(tyro.cli(TextsConfig))

"""What decides which text a trainer's steps read, kept with the trunk: a resumed trainer is told where it differs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from node.trainer.train_step import Training

METADATA_KEY = "reading"
SETTINGS = ("batch", "micro_batches", "seed", "shard", "n_shards")


def reading_of(training: Training) -> dict[str, object]:
    """The corpus and the settings of this training, as a checkpoint keeps them."""
    dataset, config = training.dataset, training.config
    corpus = {
        "title": dataset.corpus.title,
        "bytes": dataset.index.train_bytes + dataset.index.held_out_bytes,
        "content": dataset.index.content,
    }
    return {"corpus": corpus, **{name: getattr(config, name) for name in SETTINGS}}


def change_since(metadata: Mapping[str, str], training: Training) -> str:
    """One line that says what a checkpoint's training read and what this one reads; empty if that is the same.

    Empty too for a checkpoint that does not tell: older ones have no such entry.
    """
    try:
        was = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError):
        return ""
    now = reading_of(training)
    changes = [
        f"{_flag(name)} was {_shown(was[name])} and is {_shown(value)}"
        for name, value in now.items()
        if isinstance(was, dict) and name in was and _identity(was[name]) != _identity(value)
    ]
    if not changes:
        return ""
    return (
        f"going on with other settings of the data: {', '.join(changes)}; steps may read text again or leave some out"
    )


def _flag(name: str) -> str:
    return "--data" if name == "corpus" else f"--{name.replace('_', '-')}"


def _identity(value: object) -> object:
    """What makes a corpus the same: its text, whatever it is called."""
    return value.get("content") if isinstance(value, dict) else value


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"{value.get('title')} ({value.get('bytes')} bytes, hash {str(value.get('content'))[:8]})"
    return str(value)

"""Which topic a held-out window has: what its document's record says, or where its document lies."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from common.tokenizer import ByteTokenizer, FileTokenizer
from node.data import open_dataset
from node.data.documents import MAX_TOPIC_CHARS
from node.data.sources import find_corpus, labelled_documents
from node.data.topics import MAX_TOPICS, OTHERS, WindowTopics, window_topics
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from common.tokenizer import Tokenizer
    from node.data import TextDataset


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def topics_of(path: Path) -> list[str]:
    return [document.topic for document in labelled_documents(find_corpus(path))]


@pytest.mark.parametrize(
    ("record", "topic"),
    [
        ({"text": "a", "topic": "Arts", "label": "no"}, "Arts"),
        ({"text": "a", "label": 7}, "7"),
        ({"text": "a", "topic": None, "category": "Law"}, "Law"),
        ({"text": "a", "topic": True}, ""),
        ({"text": "a", "topic": "x" * 999}, "x" * MAX_TOPIC_CHARS),
        ({"text": "a", "topic": ["Arts"]}, ""),
        ("a", ""),
    ],
)
def test_a_documents_topic_is_what_its_record_says(tmp_path: Path, record: Any, topic: str) -> None:
    (tmp_path / "one.json").write_text(json.dumps([record]))
    assert topics_of(tmp_path / "one.json") == [topic]
    assert topics_of(write_rows(tmp_path / "one.jsonl", [{"text": "b"}, record])) == ["", topic]


def test_elsewhere_it_is_the_subfolder_or_the_file_that_it_lies_in(tmp_path: Path) -> None:
    write_rows(tmp_path / "law" / "deep" / "rows.jsonl", [{"text": "a"}, {"text": "b", "topic": "Arts"}])
    (tmp_path / "notes.txt").write_text("c")
    assert topics_of(tmp_path) == ["law", "Arts", "notes.txt"]


TEXTS = {"cats": "cats purr and purr and sleep", "dogs": "dogs bark at what is not there"}


def opened(folder: Path, tokenizer: Tokenizer | None = None) -> TextDataset:
    rows = [{"text": f"{TEXTS[topic]} {number}", "topic": topic} for number in range(400) for topic in TEXTS]
    file = write_rows(folder / "rows.jsonl", rows)
    return open_dataset(file, cache_dir=folder / "cache", seed=3, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), FileTokenizer(tiny_tokenizer(), "a test")], ids=["bytes", "BPE"]
)
def test_a_windows_topic_is_that_of_the_document_with_most_of_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = opened(tmp_path, tokenizer)
    starts_N = dataset.spread_held_out(8) * 8
    found = window_topics(dataset, starts_N, 8, seed=3)
    assert found is not None
    assert found.names == ("cats", "dogs")
    windows = [tokenizer.decode(dataset.held_out[start : start + 8].tolist()) for start in starts_N]
    told = [found.names[number] for number in found.of_window_N]
    sure = [
        (topic, "cats" if any(w in text for w in (b"purr", b"cats", b"sleep")) else "dogs")
        for text, topic in zip(windows, told, strict=True)
        if b"\n" not in text and any(w in text for w in (b"purr", b"cats", b"sleep", b"bark", b"dogs", b"there"))
    ]
    assert len(sure) > len(windows) // 4
    assert all(topic == expected for topic, expected in sure)


def test_where_the_text_is_another_by_now_no_topic_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = opened(tmp_path)
    starts_N = dataset.spread_held_out(8) * 8
    changed = replace(dataset, index=replace(dataset.index, held_out_tokens=dataset.index.held_out_tokens + 1))
    with caplog.at_level(logging.WARNING):
        assert window_topics(changed, starts_N, 8, seed=3) is None
    assert "Topics are left out: rows.jsonl is too short, or has changed since it was read" in caplog.text


def test_rare_topics_beyond_the_bound_are_one_topic(tmp_path: Path) -> None:
    rows = [{"text": f"text number {number} " * 4, "topic": f"topic {number}"} for number in range(4000)]
    dataset = open_dataset(write_rows(tmp_path / "rows.jsonl", rows), cache_dir=tmp_path / "cache", seed=3)
    found = window_topics(dataset, dataset.spread_held_out(64) * 64, 64, seed=3)
    assert isinstance(found, WindowTopics)
    assert len(found.names) == MAX_TOPICS
    assert OTHERS in found.names
    assert np.bincount(found.of_window_N).argmax() == found.names.index(OTHERS)

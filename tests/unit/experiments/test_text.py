"""The texts that arms learn."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from common.errors import DataError
from experiments.arms import text
from experiments.arms.arm import Arm, TrainSpec
from experiments.arms.labels import Topics
from experiments.arms.text import long_text, open_text

if TYPE_CHECKING:
    from pathlib import Path


def test_the_long_text_has_three_languages_and_python_and_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "SOURCES", ("matplotlib",))
    file = long_text(tmp_path / "cache")
    written = file.stat()
    topics = [json.loads(line)["topic"] for line in file.read_bytes().splitlines()]
    assert {topic: topics.count(topic) > 100 for topic in topics} == dict.fromkeys(
        ("English", "French", "Spanish", "Python"), True
    )
    assert long_text(tmp_path / "cache") == file
    assert file.stat().st_ino == written.st_ino, "what is there is not written again"


def test_the_topics_of_the_long_text_are_those_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SOURCES", ())
    monkeypatch.setattr(text, "data_cache", lambda: tmp_path)
    dataset = open_text("long")
    topics = Topics(dataset)
    assert topics.names == ["English", "French", "Spanish"]
    french = np.asarray(dataset.train)[topics.train_X == topics.names.index("French")]
    assert " être ".encode() in french.tobytes()
    assert " être ".encode() not in np.asarray(dataset.train)[topics.train_X == 0].tobytes()


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SOURCES", ("no-such-package",))
    with pytest.raises(DataError, match="no-such-package, which is not installed: make setup"):
        long_text(tmp_path)


def test_a_spec_names_its_text_only_where_it_is_not_that_of_the_first_runs() -> None:
    spec = TrainSpec(arm=Arm(label="dense", hidden=8), seed=0, tokens=1, lr=1.0, expert_lr=1.0, text="long")
    assert spec.to_json()["text"] == "long"
    assert TrainSpec.from_json(spec.to_json()) == spec
    first = TrainSpec(arm=Arm(label="dense", hidden=8), seed=0, tokens=1, lr=1.0, expert_lr=1.0)
    assert "text" not in first.to_json()
    assert TrainSpec.from_json(first.to_json()) == first

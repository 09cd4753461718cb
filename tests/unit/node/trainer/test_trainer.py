"""What a trainer tells of its text before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.events import EventLog
from node.data import open_dataset
from node.trainer.trainer import MAX_NAMES_TOLD, _tell_left_out
from tests.support.events import written_to

if TYPE_CHECKING:
    from pathlib import Path


def told_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    log = EventLog()
    log.subscribe(written_to(rows))
    _tell_left_out(open_dataset(folder, cache_dir=folder / "cache"), log)
    return [{name: value for name, value in row.items() if name != "t"} for row in rows]


def test_what_is_left_out_of_the_text_is_an_event(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"Text {name}.", encoding="utf-8")
    assert told_of(tmp_path) == []
    for number in range(MAX_NAMES_TOLD + 5):
        (tmp_path / f"{number:03}.zip").write_bytes(b"PK")
    (tmp_path / "rows.jsonl").write_text('{"text": null}\n', encoding="utf-8")
    (event,) = told_of(tmp_path)
    assert (event["event"], event["files"], len(event["names"])) == ("left_out", MAX_NAMES_TOLD + 5, MAX_NAMES_TOLD)
    assert event["names"][0] == "000.zip (compressed: unpack it)"
    assert event["rows"] == 1
    assert event["first_row"].startswith(f"{tmp_path / 'rows.jsonl'}, line 1: has no text")

"""What live nodes told is read from all files of their logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.events import EventLog
from experiments.live.processes import events
from node.trainer.events import RetryEvent

if TYPE_CHECKING:
    from pathlib import Path


def test_events_are_read_from_every_file_of_a_log_in_order(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert events(path) == []
    log = EventLog(path, max_bytes=300, n_files=5)
    for step in range(12):
        log.emit(RetryEvent(step=step, reason="test"))
    log.close()
    with path.open("ab") as file:
        file.write(b'{"t":1,"event":"ret')
    assert (tmp_path / "events.jsonl.2").exists()
    assert [row["step"] for row in events(path, "retry")] == list(range(12))

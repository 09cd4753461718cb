"""The suite of benchmarks: which there are, and what it writes on a page. None is run here."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks import report, suite

if TYPE_CHECKING:
    from pathlib import Path

ROWS = (
    report.compare("case 1", "tokens/s", [12_345.0, 12_345.0], "hivemind", [2.0]),
    report.not_compared("case 2", "MB", [1.5], "-", "only told"),
)


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_every_benchmark_says_its_command_in_its_first_line(name: str) -> None:
    module = importlib.import_module(f"tests.benchmarks.{name}")
    first = (module.__doc__ or "").splitlines()[0]
    assert first == f"python -m tests.benchmarks.{name} --json runs/bench/{name}.json"


def test_unknown_names_are_told_with_those_that_are_known() -> None:
    assert suite.chosen("wire,codec") == ["wire", "codec"]
    with pytest.raises(SystemExit, match=r"'walk' is not known; known: kernels, codec"):
        suite.chosen("codec,walk")


def test_a_page_gets_the_newest_tables_first(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{suite.MARK}")
    content = json.loads(json.dumps(report.document("wire", ROWS, ["a note", "words " * 40])))
    suite.write_page(page, [content])
    suite.write_page(page, [{**content, "benchmark": "codec"}])
    text = page.read_text()
    assert text.index("### codec") < text.index("### wire")
    assert "| case 1 | tokens/s | 12,340 | hivemind (median of 1 runs, ours of 2) | 2 | 6,172 | 2 |" in text
    assert "| case 2 | MB | 1.5 | - (only told) | - | - | 1 |" in text
    assert "- a note\n- words words" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "python -m tests.benchmarks.codec --json runs/bench/codec.json" in text


@pytest.mark.parametrize(
    ("text", "problem"), [("# Page\n", "has no line"), (None, "there is no .*page.md; name a page")]
)
def test_a_page_that_takes_no_table_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, problem: str
) -> None:
    page, ran = tmp_path / "page.md", list[str]()
    if text is not None:
        page.write_text(text)
    monkeypatch.setattr(suite, "ran", lambda name, *_: ran.append(name))
    with pytest.raises(SystemExit, match=problem):
        suite.main(suite.Suite(out=tmp_path, only="wire", record=page))
    assert not ran
    assert page.exists() is (text is not None)


def test_a_benchmark_that_fails_is_told_and_its_old_rows_are_not_shown_as_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "wire.json"
    old.write_text("{}")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(SystemExit, match="failed: wire"):
        suite.main(suite.Suite(out=tmp_path, only="wire"))
    assert not old.exists()

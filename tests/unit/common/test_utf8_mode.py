"""A program in a folder with an umlaut runs in a locale that knows none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import os, sys
from common.utf8_mode import start_again_if_needed
start_again_if_needed()
print(sys.flags.utf8_mode, sys.stdout.encoding, ascii(os.path.basename(os.path.dirname(os.path.abspath(__file__)))))
"""


@pytest.mark.parametrize(("folder", "mode"), [("hive", "0"), ("h\u00efve", "1")])
def test_a_path_that_the_locale_cannot_read_is_read_in_utf8_mode(tmp_path: Path, folder: str, mode: str) -> None:
    (tmp_path / folder).mkdir()
    shutil.copytree(ROOT / "common", tmp_path / folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / folder / "program.py").write_text(CODE, encoding="utf-8")
    # The interpreter itself, as a virtual environment may be in such a folder too.
    done = subprocess.run(
        [os.path.realpath(sys.executable), str(tmp_path / folder / "program.py")],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.stdout.split() == [mode, "ascii", ascii(folder)], done.stderr

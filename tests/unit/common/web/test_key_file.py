"""The key that callers must have: made once, read by its owner alone."""

from __future__ import annotations

import logging
import stat
from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError
from common.web.key_file import read_key

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_is_made_where_there_is_none_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys" / "serve.key"
    with caplog.at_level(logging.INFO):
        key = read_key(path)
    assert len(key) >= 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert str(path) in caplog.text
    assert key not in caplog.text
    assert read_key(path) == key
    assert read_key(tmp_path / "other.key") != key


def test_a_key_of_ones_own_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sk-0123456789abcdef\n")
    path.chmod(0o600)
    assert read_key(path) == "sk-0123456789abcdef"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_may_read_or_write_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_text("sk-0123456789abcdef\n")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"--key-file {path}: other users can read it; run: chmod 600 {path}"):
        read_key(path)


@pytest.mark.parametrize(
    "content", ["", "short", "two keys in one line", "x" * 513, "sk-0123456789abcdef\nanother", "schlüssel-0123456789"]
)
def test_a_file_without_one_good_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="must hold one key of 16 to 512 visible ASCII characters"):
        read_key(path)


def test_a_folder_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--key-file"):
        read_key(tmp_path)

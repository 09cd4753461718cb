"""What a host tells its owner can be typed as it is, and names the folder that it keeps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import run_node
from common.command_line import parse
from node.host.config import HostConfig
from node.host.owner_words import owner_words
from node.limits.memory import Capacity

if TYPE_CHECKING:
    import pytest

CAPACITY = Capacity(max_blocks=8, keep_inputs_bytes=1, max_batch_tokens=1, max_queue_tokens=1)


def commands_in(words: tuple[str, ...]) -> list[list[str]]:
    return [shlex.split(command) for text in words for command in re.findall(r"`kilohive (.*?)`", text)]


def test_in_its_usual_folder_it_is_steered_without_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_STATE", str(tmp_path))
    words = owner_words(HostConfig(), CAPACITY)
    assert str(tmp_path / "host") in words[0]
    assert commands_in(words) == [["pause"], ["resume"], ["leave"], ["host", "--help-limits"]]


def test_in_another_folder_it_is_steered_from_wherever_its_owner_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = owner_words(HostConfig(state=Path("my host")), CAPACITY)
    assert str(tmp_path / "my host") in words[0]
    *steering, _ = commands_in(words)
    assert [name for name, *_ in steering] == ["pause", "resume", "leave"]
    for name, *flags in steering:
        command = next(command for command in run_node.COMMANDS if command.name == name)
        assert parse(command, flags, "kilohive").config.state == tmp_path / "my host"


def test_it_says_what_it_takes() -> None:
    assert "with 1 thread and holds at most 8 blocks" in owner_words(HostConfig(), CAPACITY)[2]
    few = Capacity(max_blocks=1, keep_inputs_bytes=1, max_batch_tokens=1, max_queue_tokens=1)
    assert "with 2 threads and holds at most 1 block;" in owner_words(HostConfig(threads=2), few)[2]

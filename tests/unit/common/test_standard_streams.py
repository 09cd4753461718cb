"""Output whose reader leaves, streams that are closed, terminals with few characters: none of them ends the work."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.standard_streams import OutputFile

ROOT = Path(__file__).resolve().parents[3]
FULL = Path("/dev/full")
TIMEOUT_S = 30.0
LATIN = {"PYTHONIOENCODING": "latin-1"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}


def shell(words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`words` with $K for the command; exit code of the first command of a pipe, as `pipefail` has it."""
    command = shlex.join([sys.executable, str(ROOT / "run_node.py")])
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", words.replace("$K", command)],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def test_output_goes_nowhere_once_its_reader_has_left() -> None:
    reader, writer = os.pipe()
    output = OutputFile(writer)
    text = io.TextIOWrapper(output, write_through=True)
    text.write("read")
    assert os.read(reader, 10) == b"read"
    os.close(reader)
    for _ in range(2):
        text.write("not read")
    assert os.write(writer, b"by a library") == len(b"by a library")
    assert output.lost is None
    os.close(writer)


def test_a_terminal_that_was_closed_is_a_reader_that_left() -> None:
    terminal, own = os.openpty()
    os.close(terminal)
    output = OutputFile(own)
    assert output.write(b"to nobody") == len(b"to nobody")
    assert output.lost is None
    assert os.fstat(own).st_rdev == Path(os.devnull).stat().st_rdev
    os.close(own)


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full, a disk without room, is Linux's")
def test_a_full_disk_does_not_end_the_work_but_is_told_at_its_end() -> None:
    with FULL.open("wb") as file:
        output = OutputFile(file.fileno())
        assert output.write(b"a line") == len(b"a line")
        assert output.lost is not None
    done = shell("$K --version > /dev/full")
    assert (done.returncode, done.stderr) == (
        1,
        b"error: standard output: No space left on device; some of it is missing\n",
    )


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data, read = os.urandom(1 << 20), bytearray()

    def read_all() -> None:
        while len(read) < len(data):
            read.extend(os.read(reader, 1 << 16))

    thread = threading.Thread(target=read_all)
    thread.start()
    assert OutputFile(writer).write(data) == len(data)
    thread.join(TIMEOUT_S)
    assert bytes(read) == data
    for descriptor in (reader, writer):
        os.close(descriptor)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("$K host --help | true", 0),
        ("$K --help | head -1", 0),
        ("$K --help 2>&1 | true", 0),
        ("$K --help >&-", 0),
        ("$K --help <&- >&- 2>&-", 0),
        ("$K host --join kh1oops 2>&-", 2),
        ("$K host --join kh1oops <&- >&-", 2),
        ("$K health --state /nonexistent <&- >&-", 1),
        ("$K health --state /nonexistent 2>&1 | true", 1),
    ],
)
def test_a_command_ends_as_it_would_whoever_reads_it(words: str, code: int) -> None:
    done = shell(words)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("environment", [LATIN, ASCII], ids=["Latin-1", "ASCII"])
@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ("$K host --help", 0, b"--state PATH"),
        ("$K status --join $'\\xe4\\xff.toml'", 2, b"neither an invite"),
        ("$K host --join '\u2192'", 2, b"neither an invite"),
        ("$K evaluate --join no.toml --out '\u2581\u2582'", 2, b"no.toml"),
        ("$K sample --join no.toml --prompt $'\\xff'", 2, b"no.toml"),
    ],
)
def test_characters_that_a_terminal_does_not_have_are_replaced(
    environment: dict[str, str], words: str, code: int, shown: bytes
) -> None:
    done = shell(words, **environment)
    assert done.returncode == code, done.stderr
    assert shown in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr


def test_what_a_process_opens_first_does_not_become_its_standard_output(tmp_path: Path) -> None:
    code = (
        "from common.standard_streams import open_standard_streams; open_standard_streams();"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('printed'); file.write(str(file.fileno()))"
    )
    shell(f'exec >&-; {shlex.quote(sys.executable)} -c "{code}"', PYTHONPATH=str(ROOT))
    assert int((tmp_path / "file").read_text()) > 2

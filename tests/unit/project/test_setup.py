"""`make setup`: the torch that fits the machine, its size told first. Stand-ins take the places of pip and of tools."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support.docs import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK = "requirements.lock"
TORCH = next(line.split()[0] for line in (ROOT / LOCK).read_text().splitlines() if line.startswith("torch=="))
VERSION = TORCH.removeprefix("torch==")
PIP = """#!/bin/sh
echo "$@" >>pip.log
[ "$1" != index ] || cat versions
"""
PYTHON = f"""#!/bin/sh
[ "$2" != 'import torch' ] || exit 1
exec {sys.executable} "$@"
"""
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A machine without torch and without a GPU, whose pip finds what PyPI has."""
    (tmp_path / LOCK).write_bytes((ROOT / LOCK).read_bytes())
    (tmp_path / "versions").write_text(f"Available versions: 9.0.0, {VERSION}, 2.0.0\n")
    stand_in(tmp_path / ".venv/bin/pip", PIP)
    stand_in(tmp_path / ".venv/bin/python", PYTHON)
    stand_in(tmp_path / "bin/uname", "#!/bin/sh\necho Linux x86_64\n")
    stand_in(tmp_path / "bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
    stand_in(tmp_path / "bin/sleep", "#!/bin/sh\nexec /bin/sleep 0.1\n")  # between the dots that show progress
    return tmp_path


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """A package index that answers."""
    (tmp_path / "index/torch").mkdir(parents=True)
    handler = functools.partial(Quiet, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *_arguments: object) -> None:  # noqa: A002 - the name that is overridden
        """Nobody reads it."""


def stand_in(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def setup(checkout: Path, *assignments: str) -> subprocess.CompletedProcess[str]:
    command = ("make", "--file", str(ROOT / "Makefile"), "--directory", str(checkout), "setup", *assignments)
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    environment.pop("MAKEFLAGS", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def installed(checkout: Path) -> list[str]:
    lines = (checkout / "pip.log").read_text().splitlines() if (checkout / "pip.log").exists() else []
    return [line for line in lines if line.startswith("install")]


def test_without_a_gpu_torch_for_processors_comes_from_its_own_index(checkout: Path, index: str) -> None:
    done = setup(checkout, f"CPU_INDEX={index}")
    assert done.returncode == 0, done.stderr
    assert "about 200 MB (TORCH=cuda fetches the other, 2.7 GB)" in done.stdout
    first, second = installed(checkout)
    assert first.endswith(f"--no-deps --index-url {index} {TORCH}")
    assert second.endswith(f"-r {LOCK}")


def test_a_torch_for_processors_that_pip_finds_by_itself_is_taken(checkout: Path) -> None:
    (checkout / "versions").write_text(f"Available versions: 9.0.0, {VERSION}+cpu, {VERSION}\n")
    done = setup(checkout, f"CPU_INDEX={NOBODY}")
    assert done.returncode == 0, done.stderr
    assert "fetching torch for processors alone, about 200 MB" in done.stdout
    assert len(installed(checkout)) == 1


def test_nvidias_libraries_are_not_fetched_for_a_machine_without_their_gpu(checkout: Path) -> None:
    done = setup(checkout, f"CPU_INDEX={NOBODY}")
    assert done.returncode != 0
    assert f"error: no NVIDIA GPU here, and {NOBODY}, which has torch" in done.stderr
    assert "TORCH=cuda" in done.stderr
    assert installed(checkout) == []


@pytest.mark.parametrize(("gpu", "assignments"), [(True, ()), (False, ("TORCH=cuda",))], ids=["a GPU", "asked for"])
def test_with_a_gpu_or_where_it_is_asked_for_the_larger_one_is_told_and_fetched(
    checkout: Path, assignments: tuple[str, ...], *, gpu: bool
) -> None:
    if gpu:
        stand_in(checkout / "bin/nvidia-smi", "#!/bin/sh\necho GPU 0\n")
    done = setup(checkout, f"CPU_INDEX={NOBODY}", *assignments)
    assert done.returncode == 0, done.stderr
    assert "Fetching torch with NVIDIA's libraries: about 2.7 GB, 5 GB on disk" in done.stdout
    assert len(installed(checkout)) == 1


def test_a_gpu_may_be_left_alone(checkout: Path, index: str) -> None:
    stand_in(checkout / "bin/nvidia-smi", "#!/bin/sh\necho GPU 0\n")
    assert setup(checkout, f"CPU_INDEX={index}", "TORCH=cpu").returncode == 0
    assert len(installed(checkout)) == 2


@pytest.mark.parametrize("machine", ["Darwin arm64", "Linux aarch64"])
def test_where_pypis_torch_brings_no_such_libraries_it_is_taken_as_it_is(checkout: Path, machine: str) -> None:
    stand_in(checkout / "bin/uname", f"#!/bin/sh\necho {machine}\n")
    assert setup(checkout, f"CPU_INDEX={NOBODY}").returncode == 0
    assert len(installed(checkout)) == 1

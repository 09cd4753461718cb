"""The wheel and the sdist as they are built from the checkout, and the wheel in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.docs import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = ("common", "coordinator", "dht", "node", "protocol")
FILES = ("pyproject.toml", "README.md", "LICENSE", "run_node.py", "kilohive.py")
BUILD_TIMEOUT_S, RUN_TIMEOUT_S = 120.0, 110.0


@dataclass(frozen=True, kw_only=True)
class Installed:
    """An environment whose command is not on PATH, and `home`, the home of whoever runs it."""

    environment: Path
    home: Path

    @property
    def command(self) -> Path:
        """The console script."""
        return self.environment / "bin" / "kilohive"

    def variables(self) -> dict[str, str]:
        """Of this process, with the command on PATH, another home, and nothing that leads to the checkout."""
        kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "KILOHIVE_STATE"}}
        kept = {name: value for name, value in kept.items() if not name.startswith("XDG_DATA")}
        path = f"{self.command.parent}:{os.environ['PATH']}"
        return {**kept, "HOME": str(self.home), "PATH": path, "OMP_NUM_THREADS": "1"}

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command as it is typed in `folder`, to its end."""
        return subprocess.run(
            [str(self.command), *arguments],
            cwd=folder,
            env=self.variables(),
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )

    @contextmanager
    def started(self, folder: Path, log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """The command as it goes on in `folder` while the context lasts; `log` takes what it prints."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(self.command), *arguments],
                cwd=folder,
                env=self.variables(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=30)


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist, the wheel made from the sdist. Built from a copy, as a build leaves files behind."""
    source, made = folder / "source", folder / "dist"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(source))
    (wheel,), (sdist,) = made.glob("*.whl"), made.glob("*.tar.gz")
    return wheel, sdist


def install(wheel: Path, folder: Path) -> Installed:
    """The wheel in a fresh environment, which finds what it depends on in this one's."""
    environment, home = folder / "venv", folder / "home"
    home.mkdir()
    _run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = str(environment / "bin" / "python")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check")
    _run(*pip, "--no-index", "--no-deps", str(wheel))
    there = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    (there / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(environment=environment, home=home)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")

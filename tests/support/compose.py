"""A compose project of its own over a file in docker/: commands, what its trainer tells, what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

from tests.support.docs import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SWARM, VOLUNTEER = ROOT / "docker" / "compose.yaml", ROOT / "docker" / "volunteer.yaml"
POLL_S = 0.5
STATE = "/tmp/state"  # noqa: S108 - in a container
NEEDS_AN_ENGINE = "make compose-test needs a Docker engine with compose 2"


def what_is_missing() -> str:
    """In one sentence; empty if nothing is."""
    if shutil.which("docker") is None:
        return f"{NEEDS_AN_ENGINE}: there is no command docker"
    for words, problem in (
        (("compose", "version"), "docker has no command compose"),
        (("version", "--format", "{{.Server.Version}}"), "none answers; start it, or name it with DOCKER_HOST"),
    ):
        if _docker(*words, timeout_s=30).returncode:
            return f"{NEEDS_AN_ENGINE}: {problem}"
    return ""


def _docker(*words: str, timeout_s: float, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("docker") or "docker", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
    )


def docker(*words: str, timeout_s: float = 60) -> str:
    """Standard output of a docker command; raises AssertionError with what it said if it fails."""
    done = _docker(*words, timeout_s=timeout_s)
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr[-2000:]}"
    return done.stdout.strip()


class Compose:
    """The project `name`; `env` are the variables that `file` reads."""

    def __init__(self, name: str, env: dict[str, str], file: Path = SWARM) -> None:
        self.name, self._env, self._file = name, env, file

    def run(self, *words: str, timeout_s: float = 120) -> str:
        """`docker compose ...` of this project."""
        every = ("compose", "--project-name", self.name, "--file", str(self._file), *words)
        done = _docker(*every, timeout_s=timeout_s, env=self._env)
        assert done.returncode == 0, f"docker {' '.join(every)}: {done.stderr[-3000:]}"
        return done.stdout.strip()

    def build(self, service: str, timeout_s: float) -> None:
        """Build the image of a service; what docker says goes to the terminal, since it takes minutes."""
        project = ("--project-name", self.name, "--file", str(self._file))
        words = ("compose", "--progress", "plain", *project, "build", service)
        done = subprocess.run(
            [shutil.which("docker") or "docker", *words],
            check=False,
            timeout=timeout_s,
            env={**os.environ, **self._env},
        )
        assert done.returncode == 0, f"docker {' '.join(words)}: see above"

    def containers(self, service: str = "", *, running: bool = True) -> list[str]:
        """Names, in order."""
        label = f"label=com.docker.compose.service={service}" if service else f"name={self.name}"
        flags = [] if running else ["--all"]
        found = docker("ps", *flags, "--filter", label, "--filter", self.label, "--format", "{{.Names}}")
        return sorted(found.split())

    @property
    def label(self) -> str:
        """Filter of what belongs to this project."""
        return f"label=com.docker.compose.project={self.name}"

    @property
    def network(self) -> str:
        """Of all its nodes."""
        return f"{self.name}_default"

    def left(self) -> list[str]:
        """Containers, networks and volumes that exist."""
        containers = docker("ps", "--all", "--quiet", "--filter", self.label)
        networks = docker("network", "ls", "--quiet", "--filter", self.label)
        volumes = docker("volume", "ls", "--quiet", "--filter", self.label)
        return [*containers.split(), *networks.split(), *volumes.split()]

    def exec(self, container: str, *words: str) -> str:
        """Run a command in a container."""
        return docker("exec", container, *words)

    def host_peer_id(self, container: str) -> str:
        """Of the host in it."""
        return str(json.loads(self.exec(container, "cat", f"{STATE}/server.json"))["peer_id"])

    def steps(self, last: int = 1_000_000) -> list[dict[str, Any]]:
        """The latest step events of the trainer."""
        (trainer,) = self.containers("trainer")
        text = self.exec(trainer, "tail", "-n", str(last), "runs/train/events.jsonl")
        rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [row for row in rows if row["event"] == "step"]

    def latest_step(self) -> dict[str, Any]:
        """The trainer has one."""
        return self.steps(last=5)[-1]


def health_of(container: str) -> str:
    """As its health check has it."""
    return docker("inspect", "--format", "{{.State.Health.Status}}", container)


def exit_code_of(container: str) -> int:
    """Of a container that has ended."""
    return int(docker("inspect", "--format", "{{.State.ExitCode}}", container))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    """Poll what nobody tells."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)


def write_figures(figures: dict[str, float]) -> Path:
    """For the docs."""
    path = ROOT / "runs" / "bench" / "compose.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    return path

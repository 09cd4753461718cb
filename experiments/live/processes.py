"""Real nodes as real processes, for experiments and tests: start them, wait for what they say, kill them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psutil

from common.errors import DeadlineError, UnavailableError
from common.events import Event, read_event
from common.log_files import log_files
from coordinator.children import Child, ChildSpec
from node.host.events import AnnouncedEvent
from protocol.swarm_file import SwarmFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from protocol.manifest import Manifest

RUN_NODE = str(Path(__file__).resolve().parents[2] / "run_node.py")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
SERVED_AT: Final = re.compile(r" is served at (http://\S+)/\n")

E = TypeVar("E", bound=Event)


def events(path: Path, name: str = "") -> list[dict[str, Any]]:
    """Events in a log so far, only those called `name` if given; a line that is still being written is left out."""
    lines = [line for file in log_files(path) for line in file.read_text().splitlines(keepends=True)]
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if not name or row["event"] == name]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Poll until `condition()` is true; DeadlineError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise DeadlineError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(POLL_S)


class Node:
    """One `run_node.py` process with its own folder. `inside` is put in front of it: `ip netns exec NAME`."""

    def __init__(
        self, folder: Path, arguments: Sequence[str], log_name: str = "log.txt", inside: Sequence[str] = ()
    ) -> None:
        self.folder, self.arguments = folder, tuple(arguments)
        self.started = time.monotonic()
        # What is measured or tested must not depend on whether this machine is plugged in, nor have pages that nobody
        # opens; a flag for one wins.
        settings = ("--set", "on_battery = true", "--set", "page_listen = 'none'")
        always = settings if self.arguments[:1] == ("host",) else ()
        self.child = Child(
            ChildSpec(
                name=folder.name,
                argv=(*inside, sys.executable, RUN_NODE, *arguments, *always, "--stop-on-stdin-eof"),
                log=folder / log_name,
                environment={"OMP_NUM_THREADS": "1"},
            )
        )

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """What it has told so far, as it stands in the log."""
        return events(self.folder / "events.jsonl", name)

    def told(self, kind: type[E]) -> list[E]:
        """What it has told so far of one kind; raises InvalidInputError for an event of another version."""
        files = log_files(self.folder / "events.jsonl")
        lines = [line for file in files for line in file.read_bytes().splitlines()]
        return [event for line in lines if (event := read_event(line, kind)) is not None]

    def wait_for(self, name: str, timeout_s: float = START_TIMEOUT_S, count: int = 1) -> dict[str, Any]:
        """The last event `name`, once there are `count`; fails at once if the process ends before."""
        self._wait(lambda: len(self.events(name)) >= count, f"{count} x {name!r}", timeout_s)
        return self.events(name)[-1]

    def wait_for_url(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """Where a `serve` has printed that it serves, without the last slash; fails at once if it ends before."""
        self._wait(lambda: self._url() is not None, "an address", timeout_s)
        return str(self._url())

    def _url(self) -> str | None:
        log = self.child.spec.log
        said = SERVED_AT.search(log.read_text()) if log is not None and log.exists() else None
        return None if said is None else said[1]

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        def arrived() -> bool:
            if condition():
                return True
            if self.child.ended():
                raise UnavailableError(f"{self.folder.name} ended before {what}:\n{self.child.log_tail()}")
            return False

        wait_until(arrived, f"{what} of {self.folder.name}; its log:\n{self.child.log_tail()}", timeout_s)

    def cpu_seconds(self) -> float:
        """Processor time so far, its own and that of the processes that it runs; 0 once it is reaped."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.child.pid)
            return sum(map(cpu_seconds_of, (own, *own.children(recursive=True))))
        return 0.0

    def kill(self) -> None:
        """SIGKILL the process alone, as a power cut would, then reap what it left."""
        os.kill(self.child.pid, signal.SIGKILL)
        wait_until(self.child.ended, f"{self.folder.name} is dead", STOP_TIMEOUT_S)
        self.child.reap()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM, wait, reap; returns the exit code."""
        if not self.child.ended():
            self.child.ask_to_stop()
            wait_until(self.child.ended, f"{self.folder.name} has left", timeout_s)
        return self.child.reap()


def cpu_seconds_of(process: psutil.Process) -> float:
    """Return the processor time of one process so far; 0 once it is reaped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def end_nodes(nodes: Sequence[Node]) -> None:
    """End every node, the last started first; kill what does not leave."""
    for node in nodes:
        if not node.child.ended():
            node.child.ask_to_stop()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline and not all(node.child.ended() for node in nodes):
        time.sleep(POLL_S)
    for node in reversed(nodes):
        if not node.child.ended():
            node.child.kill_tree()
        node.child.reap()


class ProcessSwarm:
    """A coordinator and whatever else is started, under one folder."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.nodes = folder, list[Node]()
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "wanted.toml"
        source.write_text(manifest.to_toml())
        self.coordinator = self.start("coordinator", "coordinator", "--manifest", str(source), "--out", str(folder))
        try:
            wait_until(self.swarm_file.exists, "swarm.toml was written")
        except BaseException:  # interrupted, too: nobody has this swarm to close it yet
            self.close()
            raise

    @property
    def swarm_file(self) -> Path:
        """How to join."""
        return self.folder / "swarm.toml"

    def start(self, name: str, *arguments: str) -> Node:
        """Start a node in its own folder."""
        (self.folder / name).mkdir(exist_ok=True)
        node = Node(self.folder / name, arguments)
        self.nodes.append(node)
        return node

    def host(self, name: str, blocks: str, swarm: Path | None = None, *, threads: int = 1) -> Node:
        """Start a host; returns before it is announced."""
        place = ("--join", str(swarm or self.swarm_file), "--state", str(self.folder / name))
        return self.start(name, "host", *place, "--blocks", blocks, "--threads", str(threads))

    def trainer(self, name: str, *arguments: str) -> Node:
        """Start a trainer with `--plain`."""
        out = self.folder / name
        return self.start(name, "train", "--join", str(self.swarm_file), "--out", str(out), "--plain", *arguments)

    def server(self, name: str, out: Path, *arguments: str) -> Node:
        """Start a `serve` of the trunk in `out` at a free port; returns before it serves."""
        place = ("--join", str(self.swarm_file), "--out", str(out), "--port", "0")
        return self.start(name, "serve", *place, *arguments)

    def swarm_file_through(self, node: Node) -> Path:
        """A swarm.toml that names only `node` as initial peer: for joining when the coordinator is gone."""
        node.wait_for(AnnouncedEvent.event)
        announced = node.told(AnnouncedEvent)[-1]
        file = SwarmFile(run_id=announced.run_id, initial_peers=announced.addresses)
        path = self.folder / f"through-{node.folder.name}.toml"
        file.write(path)
        return path

    def status(self) -> dict[str, Any]:
        """What `run_node.py status --json` says."""
        command = [sys.executable, RUN_NODE, "status", "--join", str(self.swarm_file), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def close(self) -> None:
        """End every node."""
        end_nodes(self.nodes)


@contextmanager
def process_swarm(folder: Path, manifest: Manifest) -> Iterator[ProcessSwarm]:
    """A coordinator that runs while the context lasts, and every node started through it."""
    swarm = ProcessSwarm(folder, manifest)
    try:
        yield swarm
    finally:
        swarm.close()

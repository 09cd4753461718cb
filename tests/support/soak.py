"""What befalls a swarm of processes for half an hour, by a seeded plan, and what is looked at meanwhile.

Each node has a network namespace of its own, so that its address can change and its line be slow; a host's folder is a
small file system, so that it can be full; a node's clock is that of `stepped_clock`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from common.errors import DeadlineError
from experiments.live.processes import RUN_NODE, Node, end_nodes, wait_until
from tests.support.docs import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from protocol.manifest import Manifest
    from tests.support.nat import Network

CLOCK_FOLDER = ROOT / "tests" / "support" / "stepped_clock"
DISK_MB = 64
START_TIMEOUT_S = 120.0
LOOK_S = 15.0
LOST_LOOKS = 2
"""In how many looks in a row a block without a replica counts as lost: one may fall between two announcements."""

WEDGED_S = 150.0
"""A trainer that nothing befalls takes a step within this time."""

SLOW_LINE = "4mbit"
MIN_FREE_S = 30.0
"""Between two troubles: a host's records live for 20 s, and whoever takes its blocks over needs a while."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One thing that befalls one node; `seconds` is how long it lasts, or until the node is started again."""

    kind: str
    node: str
    seconds: float


def plan(seed: int, hosts: Sequence[str], trainers: Sequence[str]) -> Iterator[Trouble]:
    """Troubles without end, each kind as often as the others."""
    rng = random.Random(seed)
    anybody, only_hosts = [*hosts, *trainers], list(hosts)
    kinds: dict[str, tuple[list[str], float, float]] = {
        "stopped": (anybody, 5.0, 40.0),
        "killed": (anybody, 2.0, 20.0),
        "hung up": (anybody, 2.0, 20.0),
        "restarted": (anybody, 0.0, 1.0),
        "address changed": (only_hosts, 0.0, 1.0),
        "clock stepped": (only_hosts, 10.0, 30.0),
        "disk full": (only_hosts, 10.0, 30.0),
        "slow line": (anybody, 20.0, 60.0),
    }
    while True:
        for kind in rng.sample(list(kinds), len(kinds)):
            whom, least_s, most_s = kinds[kind]
            yield Trouble(kind=kind, node=rng.choice(whom), seconds=round(rng.uniform(least_s, most_s), 1))


@dataclass
class Use:
    """Memory and descriptors of one process, looked at from time to time."""

    memory_mb: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def growth(self) -> tuple[float, float]:
        """From the second quarter of its life to the last: medians' difference of both; 0 while too little is known."""
        return tuple(_growth(values) for values in (self.memory_mb, self.descriptors))  # type: ignore[return-value]


def _growth(values: Sequence[float]) -> float:
    quarter = len(values) // 4
    if quarter < 3:
        return 0.0
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


class Member:
    """One node of the soak, over all its lives."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, net: Network) -> None:
        self.name, self.folder, self._net, self._arguments = name, folder, net, tuple(arguments)
        self.clock = folder.parent / f"{name}.clock"
        self.clock.write_text("0", encoding="ascii")
        self.uses: dict[int, Use] = defaultdict(Use)
        self.lives = 0
        self.node = self.start()

    def start(self) -> Node:
        """Another life in the same folder."""
        self.lives += 1
        resume = ("--resume",) if self._arguments[0] == "train" and self.lives > 1 else ()
        environment = (f"PYTHONPATH={CLOCK_FOLDER}", f"KILOHIVE_TEST_CLOCK={self.clock}")
        inside = (*self._net.inside(self.name), "env", *environment)
        log = self.folder.parent / f"{self.name}.log"
        self.node = Node(self.folder, (*self._arguments, *resume), log_name=str(log), inside=inside)
        return self.node

    @property
    def process(self) -> psutil.Process:
        """The node itself, below what puts it into its namespace (which execs, so that it is the same process)."""
        return psutil.Process(self.node.child.pid)

    def steps(self) -> int:
        """Steps that a trainer has done, over all its lives."""
        return len(self.node.events("step"))

    def look(self) -> None:
        """Note memory and descriptors."""
        with contextlib.suppress(psutil.Error):
            process = self.process
            use = self.uses[process.pid]
            use.memory_mb.append(process.memory_info().rss / 1e6)
            use.descriptors.append(process.num_fds())


class Soak:
    """A coordinator, hosts and trainers, and the troubles that befall them one after the other."""

    def __init__(self, folder: Path, net: Network, manifest: Manifest) -> None:
        self.folder, self.net = folder, net
        (folder / "wanted.toml").write_text(manifest.to_toml())
        self.members: dict[str, Member] = {}
        self.disks: list[Path] = []
        self.told: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._lost_looks = 0
        self._stepped: dict[str, tuple[int, float]] = {}
        net.public("watcher")

    @property
    def swarm_file(self) -> Path:
        """How to join."""
        return self.folder / "swarm.toml"

    def coordinator(self) -> None:
        """Start it; returns when it can be joined."""
        address = self.net.public("coordinator")
        flags = ("--manifest", str(self.folder / "wanted.toml"), "--out", str(self.folder), "--listen", address)
        self._add("coordinator", ("coordinator", *flags), self.folder / "coordinator")
        wait_until(self.swarm_file.exists, "swarm.toml was written", START_TIMEOUT_S)

    def host(self, name: str, *flags: str) -> None:
        """Start one with a small disk; returns when it is announced."""
        self.net.public(name)
        folder = self.folder / name
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], check=True)  # noqa: S607
        self.disks.append(folder)
        self._add(
            name,
            ("host", "--join", str(self.swarm_file), "--state", str(folder), "--page-listen", "none", *flags),
            folder,
        )
        self.members[name].node.wait_for("announced", START_TIMEOUT_S)

    def trainer(self, name: str, *flags: str) -> None:
        """Start one; returns when it trains."""
        self.net.public(name)
        folder = self.folder / name
        self._add(name, ("train", "--join", str(self.swarm_file), "--out", str(folder), "--plain", *flags), folder)
        self.members[name].node.wait_for("step", START_TIMEOUT_S)

    def run(self, troubles: Iterator[Trouble], seconds: float) -> None:
        """Troubles for so long, then a while of quiet; `problems` is what was wrong."""
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s - 2 * MIN_FREE_S:
            trouble = next(troubles)
            self._tell(trouble)
            self._befall(trouble)
            self._watch(MIN_FREE_S)
        self._watch(2 * MIN_FREE_S)

    def close(self) -> None:
        """End every node; what it did not free is told."""
        end_nodes([member.node for member in self.members.values()])
        for disk in self.disks:
            subprocess.run(["umount", str(disk)], check=False)  # noqa: S607

    def _add(self, name: str, arguments: Sequence[str], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.members[name] = Member(name, arguments, folder, self.net)

    def _befall(self, trouble: Trouble) -> None:
        member = self.members[trouble.node]
        {
            "stopped": self._stop,
            "killed": lambda m, s: self._end(m, s, signal.SIGKILL),
            "hung up": lambda m, s: self._end(m, s, signal.SIGHUP),
            "restarted": lambda m, s: self._end(m, s, signal.SIGTERM),
            "address changed": self._renumber,
            "clock stepped": self._step_clock,
            "disk full": self._fill,
            "slow line": self._slow_line,
        }[trouble.kind](member, trouble.seconds)

    def _stop(self, member: Member, seconds: float) -> None:
        # The node and its p2pd, as when a machine stands still.
        tree = [member.process, *member.process.children(recursive=True)]
        for process in tree:
            process.suspend()
        self._watch(seconds, without=member)
        for process in tree:
            process.resume()

    def _end(self, member: Member, seconds: float, number: signal.Signals) -> None:
        os.kill(member.node.child.pid, number)
        wait_until(member.node.child.ended, f"{member.name} has ended", 30.0)
        code = member.node.child.reap()
        wanted = {-9} if number is signal.SIGKILL else {0, 130}
        if code not in wanted:
            self._wrong(f"{member.name} ended with {code} after {number.name}")
        self._watch(seconds, without=member)
        member.start()

    def _renumber(self, member: Member, _seconds: float) -> None:
        address = self.net.renumber(member.name)
        try:
            wait_until(lambda: address in json.dumps(self._status()["peers"]), "it is seen there", 90.0)
        except DeadlineError as error:
            self._wrong(f"{member.name} at {address}: {error}")

    def _step_clock(self, member: Member, seconds: float) -> None:
        step_s = seconds if len(self.told) % 2 else -seconds
        member.clock.write_text(f"{step_s}", encoding="ascii")
        self._watch(MIN_FREE_S)
        member.clock.write_text("0", encoding="ascii")

    def _fill(self, member: Member, seconds: float) -> None:
        ballast = member.folder / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        self._watch(seconds)
        ballast.unlink(missing_ok=True)

    def _slow_line(self, member: Member, seconds: float) -> None:
        self.net.slow(member.name, SLOW_LINE)
        self._watch(seconds)
        self.net.full_speed(member.name)

    def _watch(self, seconds: float, *, without: Member | None = None) -> None:
        """Look at everything again and again for so long."""
        ends_s = time.monotonic() + seconds
        while (left_s := ends_s - time.monotonic()) > 0:
            began_s = time.monotonic()
            self._look(without)
            time.sleep(max(0.0, min(left_s, LOOK_S - (time.monotonic() - began_s))))

    def _look(self, without: Member | None) -> None:
        for member in self.members.values():
            if member is not without:
                member.look()
                if member.node.child.ended():
                    self._wrong(f"{member.name} ended by itself:\n{member.node.child.log_tail()}")
                    member.start()
        self._look_at_steps(without)
        lost = self._status().get("blocks_lost", [])
        self._lost_looks = self._lost_looks + 1 if lost else 0
        if self._lost_looks == LOST_LOOKS:
            self._wrong(f"blocks without a replica: {', '.join(lost)}")

    def _look_at_steps(self, without: Member | None) -> None:
        now_s = time.monotonic()
        for name, member in self.members.items():
            if not name.startswith("trainer"):
                continue
            steps, since_s = self._stepped.get(name, (-1, now_s))
            if member is without or member.steps() != steps:
                self._stepped[name] = (member.steps(), now_s)
            elif now_s - since_s > WEDGED_S:
                self._wrong(f"{name} has taken no step for {now_s - since_s:.0f} s")
                self._stepped[name] = (steps, now_s)

    def _status(self) -> dict[str, Any]:
        command = [*self.net.inside("watcher"), sys.executable, RUN_NODE, "status", "--json"]
        command += ["--join", str(self.swarm_file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
        if done.returncode:
            self._wrong(f"status: {done.stderr[-300:]}")
            return {"peers": []}
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def traces(self) -> list[str]:
        """Logs with a Python trace in them, and where it begins."""
        found = []
        for log in sorted(self.folder.glob("*.log")):
            text = log.read_text(errors="replace")
            if "Traceback" in text:
                found.append(f"{log.name}: {text[text.index('Traceback') :][:1500]}")
        return found

    def growths(self) -> dict[str, tuple[float, float]]:
        """MB and descriptors by which each node's longest life has grown."""
        return {
            name: max(member.uses.values(), key=lambda use: len(use.memory_mb)).growth()
            for name, member in self.members.items()
            if member.uses
        }

    def _tell(self, trouble: Trouble) -> None:
        row = {"at": time.strftime("%H:%M:%S"), "kind": trouble.kind, "node": trouble.node, "seconds": trouble.seconds}
        self.told.append(row)
        sys.stdout.write(f"{row['at']} {trouble.node}: {trouble.kind} ({trouble.seconds:g} s)\n")
        sys.stdout.flush()

    def _wrong(self, problem: str) -> None:
        self.problems.append(f"{time.strftime('%H:%M:%S')} {problem}")
        sys.stdout.write(f"PROBLEM {self.problems[-1]}\n")
        sys.stdout.flush()


def missing() -> str:
    """Why no soak can be made here, in one sentence that says what to do; empty if it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "make soak makes network namespaces and small file systems, which needs root: run it with sudo"
    absent = [program for program in ("ip", "tc") if shutil.which(program) is None]
    return f"make soak needs {', '.join(absent)}: install iproute2 (Debian: apt-get install iproute2)" if absent else ""

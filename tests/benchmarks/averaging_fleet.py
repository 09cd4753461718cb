"""Some peers of one kind, each in processes of its own: started, told when to begin, heard, measured, ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.harness.provenance import ROOT
from tests.benchmarks.averaging_parts import Change, Samples, agreed_at_s, change_of
from tests.benchmarks.meters import SocketMeter, pss_bytes, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from tests.benchmarks.averaging_parts import Doubles

START_TIMEOUT_S = 180.0
BEGIN_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 90.0
LEAVE_TIMEOUT_S = 15.0
FAULT_LIMIT_S = 90.0
WATCH_S = 0.05
READ_BYTES = 1 << 16
LOG_LINES = 12


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """`module` is run once per peer. A `stepwise` peer takes one step at each `go`, others go on until `stop`.

    Peers that do not agree within `round_limit_s` never may: a round that lost a part of one peer has another mean.
    """

    module: str
    peers: int
    blocks: int
    stepwise: bool
    round_limit_s: float
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round of averaging measured; bytes and memory per peer. `peak_bytes` is 0 where nobody watched.

    Without an agreement, `seconds` is the limit, and bytes are all that were sent by then.
    """

    agreed: bool
    seconds: float
    sent_bytes: float
    rest_bytes: float
    peak_bytes: float


def begun_after(dialled: Iterable[dict[str, Any]], at_s: float) -> int:
    """Bytes of the exchanges that were begun after the peers had agreed, before they heard that they had."""
    return sum(said["value"]["bytes"] for said in dialled if said["at_s"] - said["value"]["seconds"] > at_s)


class PeerProcess:
    """One peer: lines in, lines out, its own session, its own log."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        self._log, self._rest = log, b""
        with log.open("wb") as stderr:
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self.pid = self._popen.pid
        self.said: dict[str, Any] = {}
        """The latest answer of each kind since the last command."""

    def fileno(self) -> int:
        """Of its answers, for a selector."""
        if self._popen.stdout is None:
            raise RuntimeError("this peer has no output")
        return self._popen.stdout.fileno()

    def tell(self, command: str) -> None:
        """One line; forgets what it answered before."""
        if self._popen.stdin is None:
            raise RuntimeError("this peer has no input")
        self.said = {}
        self._popen.stdin.write(f"{command}\n".encode())
        self._popen.stdin.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """The whole lines that have arrived, None at the end of them; call it when there is something to read."""
        arrived = os.read(self.fileno(), READ_BYTES)
        if not arrived:
            return None
        *lines, self._rest = (self._rest + arrived).split(b"\n")
        answers = [json.loads(line) for line in lines]
        self.said |= {answer["event"]: answer for answer in answers}
        return answers

    def ended(self) -> bool:
        """Whether it has exited; it is not reaped yet."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def signal_tree(self, number: signal.Signals) -> None:
        """To it and all below it, those in sessions of their own too."""
        for process in tree(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def ask_to_leave(self) -> None:
        """End of its input."""
        with contextlib.suppress(BrokenPipeError):
            if self._popen.stdin is not None:
                self._popen.stdin.close()

    def reap(self) -> None:
        """Kill what is left of it, reap it."""
        self.signal_tree(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._popen.stdout is not None:
            self._popen.stdout.close()
        self._popen.wait(LEAVE_TIMEOUT_S)

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])


class Fleet:
    """All peers of one kind. Every wait is bounded; a peer that ends or is silent is a RuntimeError with its log."""

    def __init__(self, config: FleetConfig, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._config, self._folder = config, folder
        self._peers: list[PeerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._changes: list[Change] = []
        self._samples = Samples()
        self._seed = 0
        self._dialled: list[dict[str, Any]] = []
        self._meter: SocketMeter | None = None

    def start(self) -> None:
        """The first alone, then the others, who are told where it is; all have met when this returns."""
        self._add(())
        (first,) = self._peers
        self._wait(lambda: "up" in first.said, START_TIMEOUT_S, "start the first peer")
        for _ in range(1, self._config.peers):
            self._add(first.said["up"]["value"])
        self._wait(lambda: self._all_said("ready"), START_TIMEOUT_S, "meet")
        self._meter = SocketMeter([peer.pid for peer in self._peers])

    def round(self, seed: int, *, watch: bool = False) -> Round:
        """From fresh tensors until every peer is within 1 % of their mean, or the limit; `watch` samples memory."""
        self._reset(seed)
        everyone, target_S = range(len(self._peers)), self._samples.mean()
        rest = [pss_bytes(peer.pid) for peer in self._peers]
        peaks, by_sockets, counted = list(rest), self._sent_by_sockets(), self._counted()
        started_s = time.monotonic()
        self._tell("go")
        limit_s = self._config.round_limit_s
        with contextlib.suppress(TimeoutError):
            self._wait(
                lambda: self._agree_or_go_on(everyone, target_S, together=True),
                limit_s,
                "agree",
                (lambda: self._watch(peaks)) if watch else None,
            )
        by_sockets = self._sent_by_sockets() - by_sockets
        self._tell("stop")
        self._wait(lambda: self._all_said("stopped"), STOP_TIMEOUT_S, "stop")
        agreed_s = agreed_at_s(self._changes, everyone, target_S, started_s)
        at_s = started_s + limit_s if agreed_s is None else agreed_s
        sent = by_sockets if counted is None else (self._counted() or 0) - counted - begun_after(self._dialled, at_s)
        return Round(
            agreed=agreed_s is not None,
            seconds=at_s - started_s,
            sent_bytes=sent / len(everyone),
            rest_bytes=statistics.mean(rest),
            peak_bytes=statistics.mean(peaks) if watch else 0.0,
        )

    def fault_seconds(self, seed: int) -> float:
        """One peer freezes while its tensors move: seconds until the others agree, at most FAULT_LIMIT_S.

        The frozen peer stays frozen, so a fleet is good for one such round, its last.
        """
        self._reset(seed)
        victim, survivors = self._peers[-1], range(len(self._peers) - 1)
        self._tell("go")
        self._wait(lambda: "averaging" in victim.said, BEGIN_TIMEOUT_S, "begin to average")
        victim.signal_tree(signal.SIGSTOP)
        self._selector.unregister(victim)
        frozen_s = time.monotonic()
        with contextlib.suppress(TimeoutError):
            self._wait(
                lambda: self._agree_or_go_on(survivors, None, together=False),
                FAULT_LIMIT_S,
                "agree without the frozen one",
            )
        victim.signal_tree(signal.SIGKILL)
        at_s = agreed_at_s(self._changes, survivors, None, frozen_s)
        return FAULT_LIMIT_S if at_s is None else min(at_s - frozen_s, FAULT_LIMIT_S)

    def close(self) -> None:
        """End of input to all at once, time to leave, then SIGKILL; none is left after."""
        for peer in self._peers:
            peer.ask_to_leave()
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        with contextlib.ExitStack() as stack:
            stack.callback(self._selector.close)
            for peer in self._peers:
                stack.callback(peer.reap)
            while not all(peer.ended() for peer in self._peers) and time.monotonic() < deadline:
                self._hear(WATCH_S)

    def _add(self, initial_peers: Sequence[str]) -> None:
        config, index = self._config, len(self._peers)
        flags = ("--index", str(index), "--peers", str(config.peers), "--blocks", str(config.blocks))
        initial = ("--initial-peers", *initial_peers) if initial_peers else ()
        argv = (sys.executable, "-m", config.module, *flags, *config.arguments, *initial)
        peer = PeerProcess(argv, self._folder / f"peer-{index}.log")
        self._peers.append(peer)
        self._selector.register(peer, selectors.EVENT_READ, index)

    def _reset(self, seed: int) -> None:
        self._changes, self._samples, self._dialled, self._seed = [], Samples(), [], seed
        self._tell(f"reset {seed}")
        self._wait(lambda: self._all_said("reset"), START_TIMEOUT_S, "fill their tensors")

    def _agree_or_go_on(self, among: Sequence[int], target_S: Doubles | None, *, together: bool) -> bool:
        """Peers that take a step at a time are asked for another one: when all have taken theirs, or each at once."""
        stepped = [self._peers[index] for index in among if "stepped" in self._peers[index].said]
        if self._config.stepwise and together and len(stepped) < len(among):
            return False
        if self._samples.agree(among, target_S):
            return True
        for peer in stepped:
            peer.tell("go")
        return False

    def _tell(self, command: str) -> None:
        for peer in self._peers:
            peer.tell(command)

    def _all_said(self, event: str) -> bool:
        return all(event in peer.said for peer in self._peers)

    def _counted(self) -> int | None:
        """Bytes that the peers say they have exchanged so far, if they count them; after `reset` or `stopped`."""
        counts = [(peer.said.get("reset") or peer.said["stopped"])["value"] for peer in self._peers]
        return None if None in counts else sum(counts)

    def _sent_by_sockets(self) -> int:
        if self._meter is None:
            raise RuntimeError("this fleet was not started")
        return self._meter.read()

    def _watch(self, peaks: list[int]) -> None:
        for index, peer in enumerate(self._peers):
            peaks[index] = max(peaks[index], pss_bytes(peer.pid))

    def _wait(
        self, until: Callable[[], bool], timeout_s: float, what: str, meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Hear the peers until `until()`; TimeoutError saying that they did not `what`."""
        deadline = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the peers did not {what} within {timeout_s:.0f} s; logs end:\n{self._last_words()}"
                )
            self._hear(WATCH_S)
            for index, peer in enumerate(self._peers):
                if peer.ended():
                    raise RuntimeError(f"peer {index} ended before all could {what}; its log:\n{peer.last_words()}")
            if meanwhile is not None:
                meanwhile()

    def _hear(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            peer = key.fileobj
            if not isinstance(peer, PeerProcess):
                raise TypeError(f"{peer!r} is no peer")
            answers = peer.read()
            if answers is None:
                self._selector.unregister(peer)
            for said in answers or ():
                if said["event"] == "sample":
                    self._take_sample(change_of(said, key.data, self._seed))
                elif said["event"] == "dialled":
                    self._dialled.append(said)

    def _take_sample(self, change: Change | None) -> None:
        if change is not None:
            self._changes.append(change)
            self._samples.put(change)

    def _last_words(self) -> str:
        return "\n".join(f"peer {index}: {peer.last_words()}" for index, peer in enumerate(self._peers))


@contextlib.contextmanager
def running(config: FleetConfig, folder: Path) -> Iterator[Fleet]:
    """A fleet that is up and has met; whatever happens, none of its processes is left after.

    The caller must have called `adopt_orphans`, or those that a peer abandons would be out of reach.
    """
    fleet = Fleet(config, folder)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.close()

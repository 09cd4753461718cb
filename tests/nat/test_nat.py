"""Two homes behind NATs and a public network: who trains with whom, through what, and what a relay's death changes.

Run by `make nat-test`: it needs root and makes network namespaces.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from experiments.live.processes import Node, end_nodes, wait_until
from protocol.manifest import AveragingConfig
from protocol.swarm_file import SwarmFile
from tests.support.lighthouse import needs_libp2p
from tests.support.nat import Network, missing, network
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


@pytest.fixture(autouse=True, scope="module")
def _possible_here() -> None:
    """A failure, not a skip: nobody runs these tests but who has asked for them."""
    if why := missing():
        pytest.fail(why, pytrace=False)


MANIFEST = small_manifest(
    optimizer={"lr": 3e-3, "expert_lr": 3e-3}, averaging=AveragingConfig(target_replicas=2, period_s=1.0)
)
ALL_BLOCKS = "0/0-3,1/0-3"
TRAIN = ("--plain", "--eval-every", "0", "--set", "eval_bytes=2048", "--wait-for-blocks-s", "60")
HOMES = ("home-a", "home-b")
STEPS = 60
CALLS_S = 5.0
RECOVERED_WITHIN_S = 60.0
TIMEOUT_S = 90.0
MEDIAN_FACTOR, MEDIAN_MS = 3.0, 3.0
"""A call through a relay may take so many times a direct one, and so many milliseconds more."""


class Lab:
    """Nodes of one run, each in the namespace of its name."""

    def __init__(self, folder: Path, net: Network) -> None:
        self.folder, self.net = folder, net
        self._nodes: list[Node] = []
        (folder / "wanted.toml").write_text(MANIFEST.to_toml())

    @property
    def swarm_file(self) -> Path:
        return self.folder / "swarm.toml"

    def coordinator(self, *flags: str) -> Node:
        address = self.net.public("coordinator")
        manifest = ("--manifest", str(self.folder / "wanted.toml"), "--out", str(self.folder), "--listen", address)
        node = self._start("coordinator", "coordinator", "coordinator", *manifest, *flags)
        wait_until(self.swarm_file.exists, "swarm.toml was written")
        return node

    def lighthouse(self, name: str) -> Node:
        """Returns when it listens."""
        self.net.public(name)
        where = ("--join", str(self.swarm_file), "--state", str(self.folder / name))
        node = self._start(name, name, "lighthouse", *where)
        node.wait_for("start")
        return node

    def host(self, name: str, place: str, blocks: str = ALL_BLOCKS, *flags: str) -> Node:
        """Returns when it is announced."""
        state = ("--join", str(self.swarm_file), "--state", str(self.folder / name), "--blocks", blocks)
        node = self._start(name, place, "host", *state, *flags)
        node.wait_for("announced")
        return node

    def trainer(self, name: str, place: str, *flags: str, swarm: Path | None = None) -> Node:
        where = ("--join", str(swarm or self.swarm_file), "--out", str(self.folder / name))
        return self._start(name, place, "train", *where, *TRAIN, *flags)

    @contextmanager
    def calls(self, place: str, callee: Node, seconds: float, swarm: Path | None = None) -> Iterator[Calls]:
        """Calls from a place to a host, for so many seconds or until the end of the context."""
        peer_id = str(callee.events("announced")[-1]["peer_id"])
        program = (sys.executable, "-m", "tests.support.timed_calls", str(swarm or self.swarm_file), peer_id)
        output = self.folder / f"calls-{time.monotonic_ns()}.jsonl"
        with output.open("wb") as out:
            command = [*self.net.inside(place), *program, str(seconds)]
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        try:
            yield Calls(output, process)
        finally:
            process.kill()
            process.wait(TIMEOUT_S)

    def close(self) -> None:
        end_nodes(self._nodes)

    def _start(self, name: str, place: str, *arguments: str) -> Node:
        (self.folder / name).mkdir(exist_ok=True)
        node = Node(self.folder / name, arguments, inside=self.net.inside(place))
        self._nodes.append(node)
        return node


class Calls:
    """What `tests.support.timed_calls` has told so far."""

    def __init__(self, output: Path, process: subprocess.Popen[bytes]) -> None:
        self._output, self._process = output, process

    def rows(self) -> list[dict[str, Any]]:
        lines = self._output.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def answered(self, after_s: float = 0.0) -> list[dict[str, Any]]:
        return [row for row in self.rows() if row["ms"] is not None and row["t"] > after_s]

    def silence_after(self, victim: Node) -> float:
        """Kills `victim` while calls are answered; seconds without an answer at most, until they are again."""
        wait_until(lambda: len(self.answered()) > 20, "calls are answered", TIMEOUT_S)
        victim.kill()
        killed_s = time.time()
        # What was on its way when it died may still arrive.
        wait_until(lambda: len(self.answered(killed_s + 1)) > 20, "calls go on", RECOVERED_WITHIN_S)
        answered_s = [killed_s, *(float(row["t"]) for row in self.answered(killed_s))]
        return max(later - earlier for earlier, later in pairwise(answered_s))

    def median_ms(self) -> float:
        """When it has ended by itself; without the first ones, which connect."""
        self._process.wait(TIMEOUT_S)
        return statistics.median(float(row["ms"]) for row in self.answered()[10:])


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with network() as net:
        lab = Lab(tmp_path, net)
        try:
            yield lab
        finally:
            lab.close()


def relays(node: Node) -> Sequence[str]:
    """Peer ids of a node's relays now."""
    told = node.events("relays")
    return told[-1]["relays"] if told else ()


def exchanges(node: Node, partner: Node) -> list[dict[str, Any]]:
    """Of a node with a partner, that went well and moved something."""
    peer_id = partner.events("announced")[-1]["peer_id"]
    return [e for e in node.events("exchange") if e["partner"] == peer_id and not e["problem"] and e["bytes"]]


def loss_falls(trainer: Node) -> bool:
    losses = [float(event["loss"]) for event in trainer.events("step")]
    return statistics.mean(losses[-10:]) < 0.8 * statistics.mean(losses[:5])


class Homes(NamedTuple):
    """A host behind each NAT, and those that anybody can dial."""

    coordinator: Node
    public: Node
    a: Node
    b: Node


@pytest.mark.timeout(600)
def test_hosts_behind_two_nats_train_with_a_public_trainer_and_outlive_their_relay(lab: Lab) -> None:
    for home in HOMES:
        lab.net.home(home)
        lab.net.block_udp(home)  # so that nothing but a relay leads from one home to the other
    homes = trained_homes(lab)
    direct_ms, relayed_ms = medians_ms(lab, homes)
    print(f"a call takes {direct_ms:.2f} ms directly and {relayed_ms:.2f} ms through a relay")
    assert relayed_ms <= MEDIAN_FACTOR * direct_ms + MEDIAN_MS
    silence_s = silence_after_the_relays_death(lab, homes)
    print(f"calls were not answered for {silence_s:.1f} s at most after the relay was killed")
    assert silence_s < RECOVERED_WITHIN_S


@pytest.mark.timeout(300)
def test_two_homes_meet_directly_after_a_call_through_a_relay(lab: Lab) -> None:
    routers = [lab.net.home(home) for home in HOMES]
    lab.coordinator()
    a = lab.host("a", HOMES[0])
    wait_until(lambda: len(relays(a)) == 1, "a relay", TIMEOUT_S)
    with lab.calls(HOMES[1], a, RECOVERED_WITHIN_S) as calls:
        wait_until(lambda: any(row["direct"] for row in calls.answered()), "both homes met", RECOVERED_WITHIN_S)
        row = next(row for row in calls.answered() if row["direct"])
        met_s = row["t"] - calls.rows()[0]["t"]
    print(f"{met_s:.1f} s after the first call both homes had met directly, at {row['seen_at']}")
    assert row["seen_at"]
    assert all(address.startswith(f"/ip4/{routers[0]}/udp/") for address in row["seen_at"])


def trained_homes(lab: Lab) -> Homes:
    for place in ("trainer", "host"):
        lab.net.public(place)
    coordinator = lab.coordinator()
    # Whoever starts when the trainer is there can ask it to dial back, and offers to be a relay.
    trainer = lab.trainer("trainer", "trainer", "--steps", str(STEPS))
    trainer.wait_for("waiting", TIMEOUT_S)
    public = lab.host("public", "host", "0/0")
    # Some blocks are here, some there, so that training waits for both; those in both are averaged.
    a, b = lab.host("a", HOMES[0], "0/0-3,1/0-1"), lab.host("b", HOMES[1], "1/0-3,0/0-1")
    homes = Homes(coordinator, public, a, b)
    trainer.wait_for("done", TIMEOUT_S)
    assert loss_falls(trainer)
    return homes


def medians_ms(lab: Lab, homes: Homes) -> tuple[float, float]:
    """Of calls from one home to a public host, and to a host in the other home, once both homes have averaged."""
    for node in (homes.a, homes.b):
        wait_until(lambda node=node: len(relays(node)) == 2, "two relays", TIMEOUT_S)  # type: ignore[misc]
    wait_until(lambda: len(exchanges(homes.a, homes.b)) >= 3, "two homes averaged through a relay", TIMEOUT_S)
    with lab.calls(HOMES[1], homes.public, CALLS_S) as direct:
        direct_ms = direct.median_ms()
    with lab.calls(HOMES[1], homes.a, CALLS_S) as relayed:
        relayed_ms = relayed.median_ms()
        assert not any(row["direct"] or row["seen_at"] for row in relayed.answered())
    return direct_ms, relayed_ms


def silence_after_the_relays_death(lab: Lab, homes: Homes) -> float:
    """Seconds; the relay is the one that calls to A take. Training goes on, and A has another relay."""
    first_relay = relays(homes.a)[0]
    victim, swarm = homes.public, lab.swarm_file
    if first_relay == homes.coordinator.events("start")[-1]["peer_id"]:
        victim, swarm = homes.coordinator, swarm_file_through(lab, homes.public)
    trainer = lab.trainer("second", "trainer", swarm=swarm)
    trainer.wait_for("step", TIMEOUT_S, count=5)
    with lab.calls(HOMES[1], homes.a, 3 * RECOVERED_WITHIN_S, swarm) as calls:
        silence_s = calls.silence_after(victim)
    trainer.wait_for("step", TIMEOUT_S, count=len(trainer.events("step")) + 20)
    wait_until(lambda: first_relay not in relays(homes.a), "the dead relay is forgotten", RECOVERED_WITHIN_S)
    return silence_s


@pytest.mark.timeout(300)
@pytest.mark.parametrize("opens", [False, True], ids=["shut", "opened"])
def test_a_home_that_cannot_be_dialled_meets_one_whose_router_opens_a_port(lab: Lab, *, opens: bool) -> None:
    routers = [lab.net.home(HOMES[0]), lab.net.home(HOMES[1], symmetric=True)]
    lab.coordinator()
    with ports_open(lab, HOMES[0] if opens else "") as opened:
        a = lab.host("a", HOMES[0])
        wait_until(lambda: len(relays(a)) == 1, "a relay", TIMEOUT_S)
        opened()
        with lab.calls(HOMES[1], a, CALLS_S) as calls:
            calls.median_ms()
            last = calls.answered()[-1]
    assert last["direct"] is opens
    assert all(address.startswith(f"/ip4/{routers[0]}/udp/") for address in last["seen_at"])


@contextmanager
def ports_open(lab: Lab, home: str) -> Iterator[Callable[[], None]]:
    """While the context lasts the home's router opens ports, if there is a home; calling the value waits for one."""
    if not home:
        yield lambda: None
        return
    with lab.net.opens_ports(home) as router:
        stdout = router.stdout
        assert stdout is not None

        def opened() -> None:
            while not stdout.readline().startswith("udp"):
                assert router.poll() is None, "the router goes on"

        try:
            yield opened
        finally:
            router.kill()


@pytest.mark.timeout(300)
def test_a_host_that_can_only_dial_out_is_still_averaged_with(lab: Lab) -> None:
    for place in ("trainer", "host"):
        lab.net.public(place)
    lab.net.home("home")
    lab.coordinator("--relay-circuits", "0")
    trainer = lab.trainer("trainer", "trainer")
    public = lab.host("public", "host", ALL_BLOCKS, "--relay-circuits", "0")
    hidden = lab.host("hidden", "home", "0/0-1")
    trainer.wait_for("step", TIMEOUT_S, count=20)

    def learnt() -> list[dict[str, Any]]:
        return [event for event in exchanges(hidden, public) if event["divergence_max"] > 0]

    wait_until(lambda: len(learnt()) >= 5, "exchanges of what was learnt", TIMEOUT_S)
    wait_until(lambda: any(event["dialled"] for event in learnt()), "one was dialled from behind the NAT", TIMEOUT_S)
    assert not relays(hidden)


@needs_libp2p
@pytest.mark.timeout(300)
def test_two_lighthouses_carry_calls_between_homes_and_one_of_them_does_it_alone(lab: Lab) -> None:
    for home in HOMES:
        lab.net.home(home)
        lab.net.block_udp(home)
    lab.coordinator("--relay-circuits", "0")
    lights = {str(light.events("start")[0]["peer_id"]): light for light in map(lab.lighthouse, ("one", "two"))}
    a = lab.host("a", HOMES[0])
    wait_until(lambda: set(relays(a)) == set(lights), "both lighthouses are relays", TIMEOUT_S)
    first, second = relays(a)
    with lab.calls(HOMES[1], a, 2 * RECOVERED_WITHIN_S) as calls:
        silence_s = calls.silence_after(lights[first])
        assert not any(row["direct"] or row["seen_at"] for row in calls.answered())
    print(f"calls were not answered for {silence_s:.1f} s at most after the lighthouse was killed")
    assert silence_s < RECOVERED_WITHIN_S
    wait_until(lambda: list(relays(a)) == [second], "the dead lighthouse is forgotten", RECOVERED_WITHIN_S)


def swarm_file_through(lab: Lab, node: Node) -> Path:
    """A swarm file whose only initial peer is `node`."""
    addresses = tuple(node.wait_for("announced")["addresses"])
    path = lab.folder / "through.toml"
    replace(SwarmFile.read(lab.swarm_file), initial_peers=addresses).write(path)
    return path

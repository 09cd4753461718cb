"""docker/compose.yaml on a real engine: four hosts train, survive what happens to containers, and leave nothing behind.

Run by `make compose-test` alone. The tests share one swarm, in this order; the times go to runs/bench/compose.json.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.compose import (
    STATE,
    VOLUNTEER,
    Compose,
    docker,
    exit_code_of,
    health_of,
    wait_until,
    what_is_missing,
    write_figures,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.timeout(1800), pytest.mark.leaks_checked_per_module]

HOSTS = 4
IMAGE = "kilohive-compose-test"
SERVICES = ("coordinator", "lighthouse", "host", "trainer")
AWAY_S = 20
"""As long as a record lives: who is away for that long is forgotten by the others."""

FIGURES: dict[str, float] = {}
FETCH_METRICS = """
import json, socket, urllib.request
addresses = sorted({info[4][0] for info in socket.getaddrinfo("host", 9464, socket.AF_INET)})
pages = {a: urllib.request.urlopen(f"http://{a}:9464/metrics", timeout=5).read().decode() for a in addresses}
print(json.dumps(pages))
"""

FETCH_LIGHTHOUSE = """
import urllib.request
print(urllib.request.urlopen("http://lighthouse:9465/metrics", timeout=5).read().decode())
"""


@pytest.fixture(scope="module")
def swarm() -> Iterator[Compose]:
    if missing := what_is_missing():
        pytest.fail(missing, pytrace=False)
    swarm = Compose(f"kilohive-test-{os.getpid()}", {"KILOHIVE_IMAGE": IMAGE, "TOTAL_TOKENS": "100000000"})
    started = time.monotonic()
    swarm.build("coordinator", timeout_s=1500)
    FIGURES["build_s"] = time.monotonic() - started
    FIGURES["image_mb"] = int(docker("image", "inspect", "--format", "{{.Size}}", IMAGE)) / 1e6
    try:
        FIGURES["up_at"] = time.time()
        swarm.run("up", "--detach", "--no-build", "--scale", f"host={HOSTS}", timeout_s=300)
        yield swarm
    finally:
        swarm.run("down", "--volumes", timeout_s=60)


def trains_on(swarm: Compose, steps: int = 20) -> None:
    """Wait until the trainer has made so many steps more."""
    wanted = swarm.latest_step()["step"] + steps
    wait_until(lambda: bool(swarm.latest_step()["step"] >= wanted), f"step {wanted}")


def is_used(swarm: Compose, peer_id: str) -> bool:
    """Whether the latest step had tokens for this host."""
    return any(host["peer_id"] == peer_id and host["share"] > 0 for host in swarm.latest_step()["hosts"])


def is_done_without(swarm: Compose, peer_id: str) -> None:
    trains_on(swarm)
    wait_until(lambda: not is_used(swarm, peer_id), "the trainer does without it")


def back_as(swarm: Compose, container: str, peer_id: str) -> str:
    """The container's peer id, once it is healthy and the trainer uses `peer_id` again."""
    wait_until(lambda: health_of(container) == "healthy", f"{container} is healthy again")
    wait_until(lambda: is_used(swarm, peer_id), f"{peer_id} is used again")
    return swarm.host_peer_id(container)


def test_four_hosts_train_and_the_loss_falls(swarm: Compose) -> None:
    (trainer,) = swarm.containers("trainer")
    wait_until(lambda: health_of(trainer) == "healthy", "the trainer serves")
    wait_until(lambda: bool(swarm.steps()), "the first step")
    first = swarm.steps()[0]
    FIGURES["first_step_s"] = first["t"] - FIGURES.pop("up_at")
    wait_until(lambda: bool(swarm.latest_step()["step"] >= 60), "step 60")
    assert len(swarm.containers("host")) == HOSTS
    assert swarm.latest_step()["loss"] < 0.7 * first["loss"]
    assert swarm.latest_step()["experts_alive"] == 64
    wait_until(lambda: all(health_of(name) == "healthy" for name in swarm.containers()), "every node is healthy")


def test_nodes_are_not_root_and_keys_are_theirs_alone(swarm: Compose) -> None:
    (coordinator,) = swarm.containers("coordinator")
    assert swarm.exec(coordinator, "stat", "--format", "%a %U", "runs/run/owner.key") == "600 kilohive"
    for host in swarm.containers("host"):
        assert swarm.exec(host, "id", "--user") == "10001"
        assert swarm.exec(host, "stat", "--format", "%a %U", f"{STATE}/identity.key") == "600 kilohive"
        assert not swarm.exec(host, "find", "/kilohive", "-name", "owner.key")
    assert len({swarm.host_peer_id(host) for host in swarm.containers("host")}) == HOSTS


def test_prometheus_would_find_every_host_by_its_services_name(swarm: Compose) -> None:
    (trainer,) = swarm.containers("trainer")
    pages = json.loads(swarm.exec(trainer, "python", "-c", FETCH_METRICS))
    assert len(pages) == HOSTS
    assert all("kilohive_tokens_total" in page for page in pages.values())


def test_the_lighthouse_sees_the_run(swarm: Compose) -> None:
    (trainer,) = swarm.containers("trainer")
    page = swarm.exec(trainer, "python", "-c", FETCH_LIGHTHOUSE)
    figures = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("kilohive_run"))
    assert float(figures['kilohive_run_peers{role="host"}']) == HOSTS


def test_a_killed_host_is_done_without_and_comes_back_as_itself(swarm: Compose) -> None:
    host = swarm.containers("host")[0]
    peer_id = swarm.host_peer_id(host)
    docker("kill", host)
    is_done_without(swarm, peer_id)
    docker("start", host)
    assert back_as(swarm, host, peer_id) == peer_id


def test_a_paused_host_is_done_without_and_used_again(swarm: Compose) -> None:
    host = swarm.containers("host")[1]
    peer_id = swarm.host_peer_id(host)
    docker("pause", host)
    time.sleep(AWAY_S)
    is_done_without(swarm, peer_id)
    docker("unpause", host)
    assert back_as(swarm, host, peer_id) == peer_id


def test_a_host_without_network_is_done_without_and_used_again(swarm: Compose) -> None:
    host = swarm.containers("host")[2]
    peer_id = swarm.host_peer_id(host)
    docker("network", "disconnect", swarm.network, host)
    time.sleep(AWAY_S)
    is_done_without(swarm, peer_id)
    docker("network", "connect", swarm.network, host)
    assert back_as(swarm, host, peer_id) == peer_id


def test_a_volunteer_alone_joins_with_an_invite_leaves_and_comes_back_as_itself(swarm: Compose) -> None:
    (coordinator,) = swarm.containers("coordinator")
    invite = swarm.exec(coordinator, "cat", "invite/invite.txt")
    volunteer = Compose(f"{swarm.name}-guest", {"KILOHIVE_IMAGE": IMAGE, "INVITE": invite}, VOLUNTEER)
    try:
        volunteer.run("up", "--detach", "--no-build")
        (host,) = volunteer.containers("host")
        peer_id = announced_by(swarm, host)
        volunteer.run("stop")
        assert exit_code_of(host) == 0, "it was killed before it had handed its blocks over"
        volunteer.run("start")
        assert announced_by(swarm, host) == peer_id
    finally:
        volunteer.run("down", "--volumes")
    assert volunteer.left() == []


def announced_by(swarm: Compose, host: str) -> str:
    """Peer id of the host in a container, once the run's trainer sees its blocks."""
    wait_until(lambda: health_of(host) == "healthy", f"{host} is healthy")
    peer_id = json.loads(swarm.exec(host, "cat", "state/host/server.json"))["peer_id"]
    (trainer,) = swarm.containers("trainer")
    status = ("kilohive", "status", "--join", "invite/invite.txt", "--json", "--log-level", "error")

    def seen() -> bool:
        peers = json.loads(swarm.exec(trainer, *status))["peers"]
        return any(peer["peer_id"] == peer_id and peer["n_blocks"] for peer in peers)

    wait_until(seen, f"{peer_id} is in the run")
    return str(peer_id)


def test_the_loss_went_on_falling_through_all_of_it(swarm: Compose) -> None:
    steps = swarm.steps()
    assert steps[-1]["loss"] < steps[60]["loss"]
    assert steps[-1]["experts_alive"] == 64
    FIGURES["steps"] = steps[-1]["step"]


def test_stop_ends_every_node_by_itself_and_down_leaves_nothing(swarm: Compose) -> None:
    services = {name: service for service in SERVICES for name in swarm.containers(service)}
    started = time.monotonic()
    swarm.run("stop")
    FIGURES["stop_s"] = time.monotonic() - started
    # 137 would be a node that the engine killed after the five seconds that it had.
    codes = {name: exit_code_of(name) for name in services}
    assert codes == {name: 130 if service == "trainer" else 0 for name, service in services.items()}
    swarm.run("down", "--volumes")
    FIGURES["down_s"] = time.monotonic() - started
    assert swarm.left() == []
    print(write_figures({name: round(value, 1) for name, value in FIGURES.items()}))

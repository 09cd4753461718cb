"""Where the experts of a trial are: in its own process, or in hosts that calls reach late, not at all, or dead."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

from common.errors import UnavailableError
from experiments.live.faulty_client import Faults, FaultyClient
from experiments.live.hosts import START_TIMEOUT_S, Churn, Hosts, kill_steps
from experiments.live.processes import process_swarm, wait_until
from node.membership.config import SwarmConfig
from node.model.moe import LocalExperts
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.swarm_client import SwarmClient
from protocol.manifest import AveragingConfig, all_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.errors import TooFewExpertsError
    from experiments.arms.arm import TrainSpec
    from experiments.harness.experiment import Result
    from node.model.moe import Experts
    from protocol.manifest import Manifest

WAIT_S = 0.05
MAX_WAITS = 2400
"""The most waits of WAIT_S: after two minutes without enough experts a trial has failed."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an arm's experts are, and what befalls them. Without `hosts` they are in the trial's own process.

    A step has `micro_batches`, of which `in_flight` at once; `delay_mean_s` and `fail` are of every call to a host, see
    `experiments.live.faulty_client.Faults`; `kills` is how often a host is killed and started again.
    """

    hosts: int = 0
    replicas: int = 1
    experts_per_block: int = 16
    micro_batches: int = 4
    in_flight: int = 1
    delay_mean_s: float = 0.0
    fail: float = 0.0
    kills: int = 0


class Where(Protocol):
    """The experts of a trial while it lasts."""

    experts: Experts

    def before_step(self, step: int) -> None:
        """Told before each step."""

    def wait(self, error: TooFewExpertsError) -> None:
        """Return when it is worth trying again; raises UnavailableError when it is not."""

    def cpu_seconds(self) -> float:
        """Processor time of all other processes of the trial."""

    def settle(self) -> None:
        """End all disturbance, and return when every expert can be called."""

    def figures(self) -> Result:
        """What happened during training; asked once, before `settle`."""


class Here:
    """The experts in this process."""

    def __init__(self, manifest: Manifest) -> None:
        self.experts: Experts = LocalExperts(manifest)

    def before_step(self, step: int) -> None:
        """Nothing happens here."""

    def wait(self, error: TooFewExpertsError) -> None:
        """All experts are here."""
        raise error

    def cpu_seconds(self) -> float:
        """There are none."""
        return 0.0

    def settle(self) -> None:
        """Nothing was disturbed."""

    def figures(self) -> Result:
        """None of it applies."""
        return {}


class OverHosts:
    """The experts in the processes of hosts."""

    def __init__(self, client: SwarmClient, hosts: Hosts, churn: Churn) -> None:
        self.experts: Experts = client.dispatcher
        self._client, self._hosts, self._churn = client, hosts, churn
        self._waits = 0
        self._wait_for_replicas()

    def before_step(self, step: int) -> None:
        """A host may die during this step."""
        self._churn.before_step(step)

    def wait(self, error: TooFewExpertsError) -> None:
        """Wait for a change of what is live."""
        self._waits += 1
        if self._waits > MAX_WAITS:
            raise UnavailableError(f"given up after {self._waits} waits for experts: {error}") from error
        self._client.dispatcher.wait_for_change(WAIT_S)

    def cpu_seconds(self) -> float:
        """The processor time of hosts, coordinator, and everybody's DHT daemons."""
        return self._hosts.cpu_seconds()

    def settle(self) -> None:
        """Faults end, whoever was killed has joined again."""
        if isinstance(self._client.client, FaultyClient):
            self._client.client.faults = Faults()
        self._churn.finish()
        self._wait_for_replicas()

    def _wait_for_replicas(self) -> None:
        """Wait until every replica is known where it is now; then forget how calls to its host went.

        That would keep a host that is back out of reach for up to a minute.
        """
        wait_until(self._knows_all, "every replica is known", START_TIMEOUT_S)
        for peer_id, _ in self._hosts.addresses():
            self._client.directory.report_success(peer_id)

    def _knows_all(self) -> bool:
        manifest = self._client.manifest
        found = self._client.directory.snapshot(with_avoided=True).replicas
        addresses = {(replica.peer_id, replica.endpoint) for replicas in found.values() for replica in replicas}
        enough = all(len(found[block]) >= manifest.averaging.target_replicas for block in all_blocks(manifest.model))
        return enough and addresses == self._hosts.addresses()

    def figures(self) -> Result:
        """Calls, bytes, and how far apart gradients and replicas were."""
        dispatcher = self._client.dispatcher
        mean, largest = dispatcher.take_staleness()
        exchanges = [event for event in self._hosts.exchanges() if event.blocks]
        return {
            "calls_ok": dispatcher.calls_ok,
            "calls_failed": dispatcher.calls_failed,
            "wire_bytes": self._client.client.wire_bytes,
            "waits": self._waits,
            "kills": self._hosts.kills,
            "staleness_mean": mean,
            "staleness_max": largest,
            "exchanges": sum(event.dialled for event in exchanges),
            "exchanged_bytes": sum(event.bytes for event in exchanges if event.dialled),
            "divergence_mean": fmean(e.divergence_mean for e in exchanges) if exchanges else 0.0,
            "divergence_max": max((e.divergence_max for e in exchanges), default=0.0),
        }


def manifest_of(spec: TrainSpec, place: Placement) -> Manifest:
    """Make the manifest, which is the same for all placements but for the replicas."""
    manifest = spec.manifest()
    return replace(
        manifest,
        codec="fp32",  # that the network alone makes the difference, not what is rounded
        model=replace(manifest.model, experts_per_block=place.experts_per_block),
        averaging=AveragingConfig(target_replicas=place.replicas),
    )


@contextmanager
def experts_at(place: Placement, manifest: Manifest, steps: int, folder: Path) -> Iterator[Where]:
    """The experts for a training of so many steps, which are there until the context ends, and their processes.

    What befalls them is drawn with the run's seed.
    """
    if not place.hosts:
        yield Here(manifest)
        return
    # A folder of its own: hosts that a trial left when it was cut may still be leaving the last one.
    with (
        tempfile.TemporaryDirectory(prefix="swarm-", dir=folder) as own,
        process_swarm(Path(own), manifest) as swarm,
    ):
        hosts = Hosts(swarm, manifest, place.hosts)
        hosts.wait_until_joined()
        faults = Faults(delay_mean_s=place.delay_mean_s, fail=place.fail, seed=manifest.seed)
        with (
            SwarmClient(
                SwarmConfig(join=str(swarm.swarm_file)),
                DispatchConfig(seed=manifest.seed),
                make_client=partial(FaultyClient, faults),
            ) as client,
            Churn(hosts, kill_steps(steps, place.kills), manifest.seed) as churn,
        ):
            yield OverHosts(client, hosts, churn)

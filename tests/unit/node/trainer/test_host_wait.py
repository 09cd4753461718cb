"""How long `sample` waits in mid-sentence for hosts that have gone, and what it says when they do not come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import DrainingError, TooFewExpertsError
from node.trainer.host_wait import WAIT_FOR_CHANGE_S, PatientWait
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from protocol.manifest import Manifest

NONE_LIVE = TooFewExpertsError("layer 1: none of its 16 experts has a live replica")
PEER_FAILED = TooFewExpertsError("layer 0: fewer than 1 experts answered", failed_peers=("peer",))


@dataclass
class Hosts:
    """Experts of which layer 1 has 4 live ones; waiting for a change takes its time of a clock, and is noted."""

    manifest: Manifest = field(default_factory=small_manifest)
    now_s: float = 100.0
    waits: list[float] = field(default_factory=list)

    def live_experts(self, layer: int) -> torch.Tensor:
        return torch.arange(16) < (16 if layer == 0 else 4)

    def wait_for_change(self, timeout_s: float) -> None:
        self.waits.append(timeout_s)
        self.now_s += timeout_s


def patient(hosts: Hosts, timeout_s: float) -> PatientWait:
    return PatientWait(hosts, timeout_s, clock=lambda: hosts.now_s)


def step(errors: list[TooFewExpertsError]) -> str:
    """Fails with each of the errors, from the last to the first."""
    if errors:
        raise errors.pop()
    return "done"


def test_what_succeeds_is_computed_once_and_waits_for_nothing() -> None:
    hosts = Hosts()
    assert patient(hosts, 0.0).until_enough(step, []) == "done"
    assert hosts.waits == []


def test_it_waits_for_a_change_where_nobody_is_live_and_not_where_a_peer_has_just_failed() -> None:
    hosts = Hosts()
    errors = [NONE_LIVE, PEER_FAILED, NONE_LIVE, PEER_FAILED]
    assert patient(hosts, 5.0).until_enough(step, errors) == "done"
    assert hosts.waits == [WAIT_FOR_CHANGE_S] * 2


def test_the_time_is_bounded_and_the_error_says_what_is_missing_and_what_to_do() -> None:
    hosts, wait_s = Hosts(), 2.5
    with pytest.raises(TooFewExpertsError) as caught:
        patient(hosts, wait_s).until_enough(step, [NONE_LIVE] * 100)
    assert hosts.waits == [1.0, 1.0, 0.5]
    assert str(caught.value) == (
        "12 of 32 experts have no host that answers, after a wait of 2.5 s (layer 1: none of its 16 experts has a live "
        "replica): start hosts for this run, look at it with `status`, and try again"
    )


def test_each_step_has_the_whole_time() -> None:
    hosts = Hosts()
    wait = patient(hosts, 2.5)
    for _ in range(3):
        assert wait.until_enough(step, [NONE_LIVE, NONE_LIVE]) == "done"


def test_a_peer_that_fails_on_and_on_is_given_up_too() -> None:
    hosts = Hosts()

    def slowly(_: None) -> None:
        hosts.now_s += 1.0
        raise PEER_FAILED

    with pytest.raises(TooFewExpertsError) as caught:
        patient(hosts, 4.0).until_enough(slowly, None)
    assert hosts.now_s == 105.0
    assert caught.value.failed_peers == ("peer",)


def test_leaving_ends_the_wait() -> None:
    class Leaving(Hosts):
        def wait_for_change(self, timeout_s: float) -> None:
            raise DrainingError("this trainer is leaving")

    with pytest.raises(DrainingError):
        patient(Leaving(), 60.0).until_enough(step, [NONE_LIVE])

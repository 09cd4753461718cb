"""DHT nodes whose clocks are wrong or are set while they run."""

from __future__ import annotations

import time

import pytest

from common.clock import SteadyClock, clock_with_sleep
from common.errors import UnavailableError
from dht import clock_watch
from dht.announcer import Announcement, Announcer
from protocol.admission import Admission
from protocol.announcements import PeerRecord
from tests.support.dht_nodes import KEY, RUN, eventually, running_nodes


class Settable:
    """A system's clock that somebody sets."""

    def __init__(self) -> None:
        self.step_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.step_s


@pytest.mark.parametrize(
    ("off_s", "said"), [(5.0, "5.0 s ahead of"), (-5.0, "5.0 s behind"), (-3600.0, "3600.0 s behind")]
)
async def test_a_node_that_joins_with_a_wrong_clock_is_told_so_first(off_s: float, said: str) -> None:
    async with running_nodes() as start_one:
        right = await start_one()
        with pytest.raises(UnavailableError, match=f"^clock: this machine's clock is {said} that of the peer"):
            await start_one(right, clock=lambda: time.time() + off_s)


@pytest.mark.parametrize("step_s", [-30.0, 30.0])
async def test_a_node_stays_in_the_swarm_when_its_clock_is_set(
    step_s: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clock_watch, "LOOK_S", 0.05)
    monkeypatch.setattr(clock_watch, "SETTLE_S", 0.05)
    system = Settable()
    async with running_nodes() as start_one:
        right = await start_one()
        node = await start_one(right, clock=SteadyClock(system))
        announcer = Announcer(
            node,
            node._config.identity,
            Admission(RUN),
            describe=lambda: Announcement(peer=PeerRecord(role="host", endpoint="127.0.0.1:4000")),
            ttl_s=2.0,
        )
        assert await announcer.announce_now()
        system.step_s = step_s

        async def noticed() -> bool:
            return "goes on by the time before" in caplog.text

        await eventually(noticed)
        before_s = clock_with_sleep()
        while clock_with_sleep() < before_s + 3.0:  # longer than a record lives
            assert await announcer.announce_now()
            assert node.peer_id in (await right.get_many([KEY])).get(KEY, {})
        assert abs(node.now_s() - time.time()) < 1.0


async def test_nodes_of_one_machine_take_its_new_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clock_watch, "LOOK_S", 0.05)
    system = Settable()
    async with running_nodes() as start_one:
        first = await start_one(clock=SteadyClock(system))
        second = await start_one(first, clock=SteadyClock(system))
        system.step_s = -30.0

        async def followed() -> bool:
            return all(abs(node.now_s() - system()) < 1.0 for node in (first, second))

        await eventually(followed)
        third = await start_one(first, clock=SteadyClock(system))
        assert third.known_peers
    assert caplog.text.count("takes the new time") == 2

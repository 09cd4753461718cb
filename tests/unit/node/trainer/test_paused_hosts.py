"""A trainer tells which hosts are paused, once for each change."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common.events import EventLog
from dht.view import PeerInfo
from node.trainer.events import PausedHost, PausedHostsEvent
from node.trainer.paused_hosts import MAX_TOLD, PausedHosts

if TYPE_CHECKING:
    from common.events import Event

WORKS = PeerInfo(
    peer_id="a",
    role="host",
    endpoint="",
    software="",
    started_s=0.0,
    n_blocks=1,
    tokens_per_s=0.0,
    run_tokens=0,
    queue_tokens=0,
    expiration_s=2e9,
)
RESTS = replace(WORKS, peer_id="b", paused=True, pause_cause="owner", paused_since_s=1000.0, paused_until_s=4600.0)
TOLD = PausedHost(peer_id="b", cause="owner", since_s=1000.0, until_s=4600.0)


class Scene:
    def __init__(self) -> None:
        self.peers: list[PeerInfo] = []
        self.told: list[Event] = []
        events = EventLog()
        events.subscribe(lambda event, _: self.told.append(event))
        directory = cast("Any", SimpleNamespace(peers=lambda: tuple(self.peers)))
        self.paused_hosts = PausedHosts(directory, events)

    def tells(self, *peers: PeerInfo) -> list[Event]:
        self.peers = list(peers)
        self.told.clear()
        self.paused_hosts.tell()
        return list(self.told)


def test_a_pause_is_told_when_it_begins_changes_and_ends() -> None:
    scene = Scene()
    assert scene.tells(WORKS) == []
    assert scene.tells(WORKS, RESTS) == [PausedHostsEvent(hosts=(TOLD,), total=1)]
    assert scene.tells(replace(WORKS, n_blocks=2), RESTS) == []
    longer = replace(RESTS, paused_until_s=9000.0)
    assert scene.tells(longer) == [PausedHostsEvent(hosts=(replace(TOLD, until_s=9000.0),), total=1)]
    assert scene.tells(WORKS) == [PausedHostsEvent(hosts=(), total=0)]


def test_of_many_the_first_are_told_and_all_are_counted() -> None:
    (event,) = Scene().tells(*(replace(RESTS, peer_id=f"{i:03}") for i in range(MAX_TOLD + 8)))
    assert isinstance(event, PausedHostsEvent)
    assert (len(event.hosts), event.total) == (MAX_TOLD, MAX_TOLD + 8)


def test_what_is_no_host_is_not_counted() -> None:
    assert Scene().tells(replace(RESTS, role="trainer")) == []

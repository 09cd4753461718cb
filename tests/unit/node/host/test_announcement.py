"""What a host says of itself, in words that the directory reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from node.host.announcement import HostAnnouncement
from node.host.availability import Availability, Reason
from protocol.manifest import all_blocks
from tests.support.keeping import MANIFEST, keeping

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.keeping import Keeping

A, B, C = all_blocks(MANIFEST.model)[:3]


def records(host: Keeping, availability: Availability) -> HostAnnouncement:
    return HostAnnouncement(
        manifest=MANIFEST,
        started=1.0,
        node_endpoint=cast("Any", SimpleNamespace(endpoint="127.0.0.1:4000", state="reached", relay_offer="")),
        runtime=host.runtime,
        held=host.held,
        averager=cast("Any", SimpleNamespace(divergence=lambda _: 0.5)),
        availability=availability,
        exchanged_bytes=lambda: 7,
    )


async def test_blocks_are_said_to_be_served_on_their_way_or_stored(tmp_path: Path) -> None:
    with keeping(tmp_path, (A, B)) as host:
        await host.placement.take_first()
        await host.block_manager.give_up([B], grace_s=0)
        host.held.joining.add(C)
        said = records(host, Availability()).describe()
        assert {record.block: record.state for record in said.blocks} == {A: "serving", B: "stored", C: "joining"}
        assert (said.peer.n_blocks, said.peer.paused, said.peer.exchanged_bytes) == (1, False, 7)


async def test_a_host_that_pauses_says_so_at_once(tmp_path: Path) -> None:
    with keeping(tmp_path, (A,)) as host:
        availability = Availability()
        availability.tell(Reason.OWNER, "its owner paused it")
        assert records(host, availability).describe().peer.paused


async def test_what_was_held_before_a_sleep_is_not_said_to_be_served(tmp_path: Path) -> None:
    now_s = [0.0]
    with keeping(tmp_path, (A,)) as host:
        await host.placement.take_first()
        said = records(host, Availability(lambda: now_s[-1]))
        assert [record.state for record in said.describe().blocks] == ["serving"]
        now_s.append(3600.0)
        assert not said.describe().blocks
        assert said.describe().peer.n_blocks == 0

"""A lighthouse among real hivemind nodes: it is asked, asks, stores, finds, and ends as it should.

Its relay has a file of its own, test_lighthouse_relay.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue

from common.command_line import arguments_for
from coordinator.lighthouse.config import LighthouseConfig
from dht.packing import place_of_peer, wrap
from experiments.live.processes import RUN_NODE, wait_until
from protocol.identity import Identity
from protocol.swarm_file import SwarmFile
from tests.support.dht_nodes import KEY, RUN, Start, cut_power, entry_by, eventually
from tests.support.lighthouse import NOBODY, Light, metric_becomes, needs_libp2p

if TYPE_CHECKING:
    from typing import Any

    from dht.node import DhtNode
    from tests.support.lighthouse import Lighthouse

pytestmark = needs_libp2p

KEY_ID = DHTID.generate(source=KEY)


def calls_of(node: DhtNode) -> Any:
    """hivemind's own calls to one peer."""
    return node._parts.node.protocol


def place_of(lighthouse: Lighthouse) -> DHTID:
    return DHTID.from_bytes(place_of_peer(lighthouse.peer_id.to_bytes()))


async def test_a_node_joins_through_a_lighthouse_and_each_has_called_the_other(light: Light, start: Start) -> None:
    lighthouse = light()
    node = await start(initial_peers=(lighthouse.address,))
    assert await calls_of(node).call_ping(lighthouse.peer_id, validate=True, strict=True) == place_of(lighthouse)
    assert lighthouse.metrics()["kilohive_lighthouse_members"] == 1


async def test_a_lighthouse_joins_through_a_node(light: Light, start: Start) -> None:
    node = await start()
    lighthouse = light(initial_peers=node.addresses)

    async def met() -> bool:
        return node.known_peers == 1

    await eventually(met)
    assert place_of(lighthouse) in calls_of(node).routing_table.uid_to_peer_id


async def test_what_is_stored_at_a_lighthouse_is_found_there_by_sub_key(light: Light, start: Start) -> None:
    lighthouse = light()
    node = await start(initial_peers=(lighthouse.address,))
    await metric_becomes(lighthouse, "kilohive_lighthouse_records", 1)  # its own
    entries = [entry_by(Identity.generate()) for _ in range(3)]
    forged = entry_by(Identity.generate())._replace(value=entries[0].value)
    rows = [*entries, forged]
    taken = await calls_of(node).call_store(
        lighthouse.peer_id,
        keys=[KEY_ID] * len(rows),
        values=[wrap(entry.value) for entry in rows],
        expiration_time=[entry.expiration_s for entry in rows],
        subkeys=[entry.subkey for entry in rows],
    )
    assert taken == [True, True, True, False]
    other = DHTID.generate(source=f"{RUN}/0/0")
    found = await calls_of(node).call_find(lighthouse.peer_id, [KEY_ID, other])
    value, _ = found[KEY_ID]
    assert isinstance(value.value, DictionaryDHTValue)
    by_owner = {owner: item.value for owner, item in value.value.items() if owner != str(lighthouse.peer_id)}
    assert by_owner == {entry.subkey: wrap(entry.value) for entry in entries}
    assert found[other][0] is None
    assert lighthouse.metrics()["kilohive_lighthouse_records"] == 4


async def test_nodes_that_know_only_the_lighthouse_find_each_other_and_what_each_stored(
    light: Light, start: Start
) -> None:
    lighthouse = light()
    one, other = [await start(initial_peers=(lighthouse.address,)) for _ in range(2)]
    entry = entry_by(Identity.generate())
    assert await one.store_many([entry]) == (True,)
    assert (await other.get_many([KEY]))[KEY][entry.subkey] == entry.value
    assert other.known_peers == 2
    await calls_of(other).call_ping(one._parts.transport.peer_id, strict=True)


async def test_records_outlive_the_lighthouse_that_they_came_through(light: Light, start: Start) -> None:
    lighthouse = light()
    one, other = [await start(initial_peers=(lighthouse.address,)) for _ in range(2)]
    entry = entry_by(Identity.generate())
    assert await one.store_many([entry]) == (True,)
    lighthouse.kill()
    assert (await other.get_many([KEY]))[KEY][entry.subkey] == entry.value


async def test_a_lighthouse_searches_and_finds_who_never_called_it(light: Light, start: Start) -> None:
    first = await start(refresh_period_s=3600.0)
    await start(first, refresh_period_s=3600.0)
    lighthouse = light(initial_peers=first.addresses)
    await metric_becomes(lighthouse, "kilohive_lighthouse_members", 2)
    assert lighthouse.metrics()["kilohive_lighthouse_members"] == 2, "and it goes on knowing both"


async def test_a_lighthouse_sees_the_run_and_forgets_who_died(light: Light, start: Start) -> None:
    node = await start()
    assert await node.store_many([entry_by(Identity.generate(), ttl_s=60.0)]) == (True,)
    lighthouse = light(initial_peers=node.addresses)
    await metric_becomes(lighthouse, 'kilohive_run_peers{role="host"}', 1)
    cut_power(node)
    await metric_becomes(lighthouse, "kilohive_lighthouse_members", 0)


def answers(address: str, *lines: bytes) -> list[bytes]:
    """What libp2p's negotiation of a connection answers, line by line; none when it is closed."""
    host, port = address.split("/")[2], int(address.split("/")[4])
    with socket.create_connection((host, port), timeout=10.0) as connection, connection.makefile("rwb") as file:
        got = []
        for line in (b"/multistream/1.0.0", *lines):
            file.write(bytes([len(line) + 1]) + line + b"\n")
            file.flush()
            length = file.read(1)
            got.append(file.read(length[0])[:-1] if length else b"")
        return got[1:]


@pytest.mark.parametrize("refused", [b"/plaintext/2.0.0", b"/secio/1.0.0"])
def test_a_connection_that_is_not_encrypted_is_refused(light: Light, refused: bytes) -> None:
    lighthouse = light()
    assert answers(lighthouse.address, refused, b"/noise") == [b"na", b"/noise"]
    assert answers(lighthouse.address, b"/tls/1.0.0") == [b"/tls/1.0.0"]


STRANGER = "tests.support.libp2p_stranger"
ROOT = Path(RUN_NODE).parent


@pytest.mark.parametrize("what", ["not-utf-8", "flood"])
async def test_a_stranger_does_not_end_or_fill_a_lighthouse(light: Light, start: Start, what: str) -> None:
    lighthouse = light()
    program = await asyncio.create_subprocess_exec(sys.executable, "-m", STRANGER, what, lighthouse.address, cwd=ROOT)
    assert await asyncio.wait_for(program.wait(), 60) == 0
    node = await start(initial_peers=(lighthouse.address,))
    assert await calls_of(node).call_ping(lighthouse.peer_id, validate=True, strict=True) == place_of(lighthouse)


def test_started_again_it_is_the_same_peer_at_the_same_place_and_says_where(light: Light) -> None:
    first = light()
    told = SwarmFile.read(first.folder / "swarm.toml")
    assert (told.run_id, told.initial_peers) == (RUN, (first.address, NOBODY))
    assert first.stop() == 0
    assert light().address == first.address


def test_ctrl_c_ends_it_in_three_seconds_with_exit_code_0(light: Light) -> None:
    lighthouse = light()
    host, port = lighthouse.address.split("/")[2], int(lighthouse.address.split("/")[4])
    with closing(socket.create_connection((host, port), timeout=5.0)):  # one that never says a word
        began = time.monotonic()
        os.kill(lighthouse.child.pid, signal.SIGINT)
        wait_until(lighthouse.child.ended, "the lighthouse has left", 3.0)
        assert time.monotonic() - began < 3.0
    assert lighthouse.child.reap() == 0
    assert [event["event"] for event in lighthouse.events()] == ["start", "leave"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--port", "99999"), "error: --port: must be from 0 (any) to 65535, is 99999"),
        (("--set", "max_circuit_mb=0"), "error: max_circuit_mb: must be 1 or more, is 0"),
        (("--listen", "0.0.0.0"), "error: --listen: others cannot call 0.0.0.0"),  # noqa: S104
        (
            ("--listen", "home.invalid"),
            "error: --listen: home.invalid cannot be looked up; give an address of this machine",
        ),
        (("--metrics-listen", "192.0.2.1", "--metrics-port", "9464"), "error: --metrics-port: cannot listen on"),
        (
            ("--set", "initial_peers=['/ip4/127.0.0.1/tcp/9/p2p/nobody']"),
            "error: initial peer '/ip4/127.0.0.1/tcp/9/p2p/nob",
        ),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(flags: tuple[str, ...], words: str, tmp_path: Path) -> None:
    where = arguments_for({"run_id": RUN, "initial_peers": (NOBODY,)}, LighthouseConfig)
    command = [sys.executable, RUN_NODE, "lighthouse", *where, *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert words in result.stderr


async def test_who_has_left_makes_room_for_others(light: Light, start: Start) -> None:
    lighthouse = light("--set", "max_connections=3")
    host, port = lighthouse.address.split("/")[2], int(lighthouse.address.split("/")[4])

    async def three_of_four_get_in() -> bool:
        with ExitStack() as stack:
            silent = [stack.enter_context(socket.create_connection((host, port), timeout=5.0)) for _ in range(4)]
            return sum(said_something(one) for one in silent) == 3

    for _ in range(3):
        await eventually(three_of_four_get_in)
    node = await start(initial_peers=(lighthouse.address,))
    assert node.known_peers == 1


def said_something(connection: socket.socket) -> bool:
    """libp2p's listener speaks first; one that is refused is closed."""
    try:
        connection.sendall(b"\x13/multistream/1.0.0\n")
        return bool(connection.recv(20))
    except ConnectionError:
        return False

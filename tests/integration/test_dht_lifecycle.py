"""How a real DHT node starts, fails, freezes and stops, and what it leaves: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from common.errors import ConfigError, UnavailableError
from dht.daemon import FOLDER_PREFIX, STALE_FOLDER_S
from experiments.live.processes import wait_until
from protocol.identity import Identity
from tests.support.dht_nodes import KEY, Start, entry_by, eventually
from tests.support.leaks import is_running


async def test_no_initial_peer_that_answers_is_one_clear_sentence(start: Start) -> None:
    gone = await start()
    address = gone.addresses[0]
    await gone.stop()
    with pytest.raises(UnavailableError, match="none answered") as caught:
        await start(initial_peers=(address,))
    assert address in str(caught.value)
    assert "connection refused" in str(caught.value)


async def test_a_silent_initial_peer_is_given_up_in_time(start: Start) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{Identity.generate().peer_id}"
        began_s = time.monotonic()
        with pytest.raises(UnavailableError, match=r"none answered within 1 s .*no answer"):
            await start(initial_peers=(address,), start_timeout_s=1.0)
        assert time.monotonic() - began_s < 5.0


async def test_somebody_else_at_the_address_is_refused(start: Start) -> None:
    node = await start()
    wrong = node.addresses[0].replace(node.peer_id, Identity.generate().peer_id)
    with pytest.raises(UnavailableError, match="none answered"):
        await start(initial_peers=(wrong,))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:4000",
        "/ip4/127.0.0.1/tcp/4000",
        "/ip4/127.0.0.1/tcp/4000/p2p/",
        "/ip4/127.0.0.1/tcp/4000/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        f"/ip4/999.0.0.1/tcp/4000/p2p/{Identity.generate().peer_id}",
        f"/nonsense/p2p/{Identity.generate().peer_id}",
    ],
    ids=["empty", "host:port", "no peer id", "empty peer id", "RSA peer id", "bad address", "no protocol"],
)
async def test_what_is_no_multiaddress_is_the_users_mistake(start: Start, text: str) -> None:
    with pytest.raises(ConfigError, match="is not a multiaddress such as"):
        await start(initial_peers=(text,))


@pytest.mark.parametrize(("host", "port"), [("localhost", 0), ("127.0.0.1", -1), ("127.0.0.1", 65536), ("", 0)])
async def test_a_host_or_port_that_is_none_is_the_users_mistake(start: Start, host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="must be"):
        await start(host=host, port=port)


async def test_a_port_in_use_is_one_clear_sentence(start: Start) -> None:
    node = await start()
    port = int(node.addresses[0].split("/")[4])
    with pytest.raises(UnavailableError, match=f"port {port}: Address already in use"):
        await start(port=port)


async def test_a_node_without_its_p2pd_says_so(start: Start) -> None:
    node = await start()
    os.kill(node.daemon_pid, signal.SIGKILL)

    async def told() -> bool:
        try:
            await node.get_many([KEY])
        except UnavailableError as error:
            return "p2pd has ended with exit code -9" in str(error)
        return False

    await eventually(told)
    with pytest.raises(UnavailableError, match="restart this node"):
        await node.store_many([entry_by(Identity.generate())])


async def test_a_frozen_peer_delays_a_lookup_and_no_more(start: Start) -> None:
    first = await start()
    frozen, reader = await start(first), await start(first)
    entry = entry_by(Identity.generate())
    assert await first.store_many([entry]) == (True,)
    os.kill(frozen.daemon_pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        assert (await reader.get_many([KEY]))[KEY] == {entry.subkey: entry.value}
        assert time.monotonic() - began_s < 8.0
    finally:
        os.kill(frozen.daemon_pid, signal.SIGCONT)


async def test_stop_leaves_nothing_and_may_be_called_twice(start: Start) -> None:
    first = await start()
    second = await start(first)
    await second.store_many([entry_by(Identity.generate()) for _ in range(10)])
    daemon = psutil.Process(second.daemon_pid)
    folder = next(Path(part.removeprefix("-id=")).parent for part in daemon.cmdline() if part.startswith("-id="))
    assert list(folder.iterdir()) == [folder / "p2pd.sock"]  # the key is there only while p2pd starts
    tasks = asyncio.all_tasks()
    began_s = time.monotonic()
    await second.stop()
    assert time.monotonic() - began_s < 3.0
    assert not daemon.is_running()
    assert not folder.exists()
    assert asyncio.all_tasks() < tasks
    await second.stop()
    with pytest.raises(UnavailableError, match="has stopped"):
        await second.get_many([KEY])


async def test_ctrl_c_in_a_terminal_does_not_reach_p2pd(start: Start) -> None:
    node = await start()  # it has its own session: while the node leaves, it can still withdraw its records
    assert os.getsid(node.daemon_pid) != os.getsid(0)


async def test_the_folder_of_a_killed_node_is_cleared_by_the_next_one(start: Start) -> None:
    folders = [Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX)) for _ in range(3)]
    stale, in_use, new = folders
    (in_use / "p2pd.sock").touch()
    for folder in (stale, in_use):
        os.utime(folder, (time.time() - 2 * STALE_FOLDER_S,) * 2)
    await start()
    assert [folder.exists() for folder in folders] == [False, True, True]
    (in_use / "p2pd.sock").unlink()
    in_use.rmdir()
    new.rmdir()


async def test_stop_ends_a_call_that_waits(start: Start) -> None:
    first = await start()
    second = await start(first)
    os.kill(first.daemon_pid, signal.SIGSTOP)
    try:
        wait_until(lambda: psutil.Process(first.daemon_pid).status() == psutil.STATUS_STOPPED, "it is stopped")
        call = asyncio.create_task(second.store_many([entry_by(Identity.generate())]))
        await asyncio.sleep(0.1)
        assert not call.done()
        began_s = time.monotonic()
        await second.stop()
        with pytest.raises(UnavailableError):
            await call
        assert time.monotonic() - began_s < 2.0
    finally:
        os.kill(first.daemon_pid, signal.SIGCONT)


def running_children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if is_running(child)}


async def test_a_start_that_is_cancelled_leaves_nothing(start: Start) -> None:
    before = running_children()
    first = await start()
    for delay_s in (0.0, 0.05, 0.1, 0.15):
        starting = asyncio.ensure_future(start(first))
        await asyncio.sleep(delay_s)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await starting).stop()
    assert running_children() - before == {first.daemon_pid}


KILLED_NODE = """
import asyncio, signal, uvloop
from dht.node import DhtConfig, DhtNode
from protocol.identity import Identity

async def main():
    node = await DhtNode.start(DhtConfig(identity=Identity.generate()))
    print(node.daemon_pid, flush=True)
    await asyncio.Event().wait()

# A shell's background job starts with SIGINT ignored, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl+C"])
def test_p2pd_ends_with_its_node_however_the_node_ends(number: signal.Signals) -> None:
    node = subprocess.Popen(
        [sys.executable, "-c", KILLED_NODE],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent.parent,
        text=True,
    )
    with node:
        assert node.stdout is not None
        daemon = psutil.Process(int(node.stdout.readline()))
        node.send_signal(number)
        try:
            node.wait(15.0)
        finally:
            node.kill()
    deadline_s = time.monotonic() + 5.0
    while is_running(daemon) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not is_running(daemon)

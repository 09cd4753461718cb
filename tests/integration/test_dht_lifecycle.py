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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from common.errors import ConfigError, UnavailableError
from dht import supervisor
from dht.daemon import Daemon
from dht.socket_folder import FOLDER_PREFIX, STALE_FOLDER_S
from experiments.live.processes import wait_until
from protocol.identity import Identity
from tests.support.dht_nodes import KEY, Start, entry_by, eventually
from tests.support.leaks import is_running

if TYPE_CHECKING:
    from collections.abc import Callable

    from dht.node import DhtNode
    from dht.record_store import Entry
    from dht.streams import Stream


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


async def test_a_node_without_its_p2pd_says_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await start()
    lost = asyncio.Event()
    node.on_lost(lost.set)
    monkeypatch.setattr(supervisor, "MAX_STARTS", 1)
    monkeypatch.setattr(Daemon, "spawn", fails_to_spawn)
    os.kill(node.daemon_pid, signal.SIGKILL)

    async def told() -> bool:
        try:
            await node.get_many([KEY])
        except UnavailableError as error:
            return "p2pd has ended with exit code -9" in str(error)
        return False

    await eventually(told)
    await asyncio.wait_for(lost.wait(), 10.0)
    with pytest.raises(UnavailableError, match="restart this node"):
        await node.store_many([entry_by(Identity.generate())])


async def fails_to_spawn(*_: object) -> Daemon:
    await asyncio.sleep(0.5)
    raise UnavailableError("nothing can be started in this test")


async def restarted(node: DhtNode) -> None:
    """Kill p2pd, and wait until the next one has met the others."""
    back = asyncio.Event()
    node.on_restart(back.set)
    os.kill(node.daemon_pid, signal.SIGKILL)
    await asyncio.wait_for(back.wait(), 10.0)


async def knows(node: DhtNode, subkeys: set[str]) -> bool:
    return (await node.get_many([KEY]))[KEY].keys() >= subkeys


async def test_p2pd_is_started_again_with_all_that_it_knew(start: Start) -> None:
    first = await start(refresh_period_s=0.2)
    second = await start(first, refresh_period_s=0.2)
    opened = asyncio.Queue[str]()

    async def greet(stream: Stream) -> None:
        opened.put_nowait(stream.peer_id)

    kept = entry_by(Identity.generate())
    for node in (first, second):
        node.keep(kept)
        await node.streams.serve("greeting", greet)
    await asyncio.sleep(0.5)  # a refresh
    for node, other in ((first, second), (second, first)):
        addresses, pid = node.addresses, node.daemon_pid
        folder = folder_of(node)
        await restarted(node)
        assert node.daemon_pid != pid
        assert not folder.exists()
        entry = entry_by(Identity.generate())
        assert await node.store_many([entry]) == (True,)
        await eventually(partial(knows, other, {entry.subkey, kept.subkey}))  # it may have to dial the other one anew
        assert node.known_peers == other.known_peers == 1
        (await other.streams.open(node.peer_id, "greeting", 5.0)).close()
        assert await asyncio.wait_for(opened.get(), 5.0) == other.peer_id
        newcomer = await start(initial_peers=addresses)
        assert entry.subkey in (await newcomer.get_many([KEY]))[KEY]
        await newcomer.stop()


async def test_a_call_in_flight_when_p2pd_dies_is_lost_at_once(start: Start) -> None:
    first = await start()
    second = await start(first)
    os.kill(first.daemon_pid, signal.SIGSTOP)
    try:
        wait_until(lambda: psutil.Process(first.daemon_pid).status() == psutil.STATUS_STOPPED, "it is stopped")
        entry = entry_by(Identity.generate())
        call = asyncio.create_task(second.store_many([entry]))
        opening = asyncio.create_task(second.streams.open(first.peer_id, "greeting", 60.0))
        await asyncio.sleep(0.1)
        assert not call.done()
        began_s = time.monotonic()
        os.kill(second.daemon_pid, signal.SIGKILL)
        with pytest.raises(UnavailableError):
            await opening
        (stored,) = await asyncio.gather(call, return_exceptions=True)
        assert time.monotonic() - began_s < 2.0
    finally:
        os.kill(first.daemon_pid, signal.SIGCONT)
    if not isinstance(stored, UnavailableError):
        assert stored == (True,)  # by this node, which is one of those that keep it
        await eventually(lambda: finds(second, entry))


async def finds(node: DhtNode, entry: Entry) -> bool:
    with contextlib.suppress(UnavailableError):  # until p2pd is back
        return entry.subkey in (await node.get_many([entry.key])).get(entry.key, {})
    return False


def folder_of(node: DhtNode) -> Path:
    """Of its p2pd's sockets."""
    command = psutil.Process(node.daemon_pid).cmdline()
    return next(Path(part.removeprefix("-id=")).parent for part in command if part.startswith("-id="))


async def test_both_sockets_lie_in_a_private_folder_that_goes(start: Start) -> None:
    shared = hivemind_sockets()
    node = await start()

    async def ignore(stream: Stream) -> None:
        stream.close()

    await node.streams.serve("greeting", ignore)
    folder = folder_of(node)
    await eventually_true((folder / "client.sock").exists)
    assert {path.name for path in folder.iterdir()} == {"p2pd.sock", "client.sock"}
    assert folder.stat().st_mode & 0o777 == 0o700
    await node.stop()
    assert not folder.exists()
    assert hivemind_sockets() <= shared


def hivemind_sockets() -> set[Path]:
    """Where hivemind would put the sockets by itself; a machine may have some of other programs."""
    return set(Path("/tmp").glob("hivemind-*"))  # noqa: S108 - nothing is made there


async def eventually_true(condition: Callable[[], bool]) -> None:
    async def checked() -> bool:
        return condition()

    await eventually(checked)


SPAWNS_AFTER_GRPC = """
import asyncio, os, signal, sys, grpc, uvloop
from dht.node import DhtConfig, DhtNode
from protocol.identity import Identity

os.register_at_fork(after_in_child=lambda: open(sys.argv[1], "w").close())

async def main():
    server = grpc.aio.server()
    echo = grpc.unary_unary_rpc_method_handler(answered)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Say": echo}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    no_proxy = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=no_proxy) as channel:
        say = channel.unary_unary("/test.Echo/Say")
        assert await say(b"before", timeout=5) == b"before"
        node = await DhtNode.start(DhtConfig(identity=Identity.generate()))
        for _ in range(2):
            back = asyncio.Event()
            node.on_restart(back.set)
            calls = [asyncio.create_task(one(say, n)) for n in range(50)]
            os.kill(node.daemon_pid, signal.SIGKILL)
            await asyncio.wait_for(back.wait(), 10)
            await asyncio.gather(*calls)
            assert await say(b"after", timeout=5) == b"after"
        await node.stop()
    await server.stop(0)

async def one(say, n):
    await asyncio.sleep(0.01 * n)
    assert await say(b"%d" % n, timeout=5) == b"%d" % n

async def answered(request, _):
    return request

with asyncio.Runner(loop_factory=uvloop.new_event_loop if sys.argv[2] == "uvloop" else None) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_grpc_goes_on_while_p2pd_is_started_again(tmp_path: Path, loop: str) -> None:
    ran = tmp_path / "python ran in a forked child"
    done = subprocess.run(
        [sys.executable, "-c", SPAWNS_AFTER_GRPC, str(ran), loop],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=40.0,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not ran.exists()


async def test_the_end_of_p2pd_is_seen_where_the_program_handles_sigchld_itself(start: Start) -> None:
    before = signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch's DataLoader does with its first worker
    try:
        node = await start()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        restarted = asyncio.Event()
        node.on_restart(restarted.set)
        os.kill(node.daemon_pid, signal.SIGKILL)
        await asyncio.wait_for(restarted.wait(), 10.0)
        daemon = psutil.Process(node.daemon_pid)
        began_s = time.monotonic()
        await node.stop()
        assert time.monotonic() - began_s < 3.0
        assert not daemon.is_running()
    finally:
        signal.signal(signal.SIGCHLD, before)


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
    assert folder.stat().st_mode & 0o777 == 0o700
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

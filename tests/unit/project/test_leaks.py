"""The leak checks of tests/conftest.py catch every kind of leak, blame the test that leaked, and nobody else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[3]

CONFIG = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = fixture-scope
filterwarnings = error
markers =
    leaks_checked_per_module
"""

# Resources go into `kept`, so that no garbage collector saves the leaky test.
HEADER = """
import asyncio, atexit, socket, subprocess, sys, threading, time
import psutil, pytest, pytest_asyncio, uvloop
from tests.support import leaks

leaks.GRACE_S = 0.3
kept = []
SLEEP = [sys.executable, "-c", "import time; time.sleep(20)"]
atexit.register(lambda: [child.kill() for child in psutil.Process().children(recursive=True)])
"""

LEAKY = """
async def test_leaks_a_task():
    kept.append(asyncio.create_task(asyncio.sleep(20)))

def test_leaks_a_thread():
    kept.append(threading.Thread(target=time.sleep, args=(2,)))
    kept[-1].start()

def test_leaks_a_daemon_thread():
    threading.Thread(target=time.sleep, args=(20,), daemon=True).start()

def test_leaks_a_process():
    kept.append(subprocess.Popen(SLEEP))

def test_leaks_a_grandchild_whose_parent_was_killed():
    start = f"import subprocess; subprocess.Popen({SLEEP!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as parent:
        parent.stdout.readline()
        parent.kill()

def test_leaks_a_listening_socket():
    kept.append(socket.create_server(("127.0.0.1", 0)))

def test_leaks_a_connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept.append(socket.create_connection(server.getsockname()))
        server.accept()[0].close()

async def test_leaks_an_error_in_a_task_that_nobody_awaits():
    async def fail():
        raise ValueError("escaped")
    asyncio.create_task(fail())
    await asyncio.sleep(0)

@pytest.fixture
async def leaky_fixture():
    yield kept.append(asyncio.create_task(asyncio.sleep(20)))

async def test_leaks_a_task_of_its_fixture(leaky_fixture):
    pass
"""

CLEAN = """
@pytest.fixture
async def server():
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()
    server.close()

async def test_is_on_uvloop_and_cleans_up(server):
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
    reader, writer = await asyncio.open_connection(*server)
    assert await reader.read() == b""
    writer.close()
    await asyncio.to_thread(time.sleep, 0)

def test_that_is_not_async_cleans_up():
    thread = threading.Thread(target=time.sleep, args=(0,))
    thread.start()
    with subprocess.Popen([sys.executable, "-c", ""]):
        thread.join()
"""

SHARED = """
in_shared_loop = pytest.mark.asyncio(loop_scope="module")

@pytest.fixture(scope="module")
async def host():
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    task = asyncio.create_task(asyncio.sleep(20))
    yield server.sockets[0].getsockname()
    task.cancel()
    server.close()

@pytest.fixture(scope="module")
def pool():
    connections = []
    yield connections
    for connection in connections:
        connection.close()

@in_shared_loop
async def test_uses_the_host(host):
    await asyncio.to_thread(time.sleep, 0)
    reader, writer = await asyncio.open_connection(*host)
    await reader.read()
    writer.close()

def test_between_them_is_not_async():
    pass

async def test_between_them_has_its_own_loop():
    await asyncio.to_thread(time.sleep, 0)

@in_shared_loop
async def test_uses_the_host_again(host):
    _, writer = await asyncio.open_connection(*host)
    writer.close()

@pytest.mark.leaks_checked_per_module
@in_shared_loop
async def test_fills_the_pool(host, pool):
    pool.append(socket.create_connection(host))

@in_shared_loop
async def test_leaks_a_task_in_the_shared_loop(host):
    kept.append(asyncio.create_task(asyncio.sleep(20)))
"""

HANGING = """
@pytest.mark.timeout(1)
async def test_hangs():
    await asyncio.sleep(50)

async def test_comes_next():
    pass
"""

LEAKY_MODULE = """
@pytest.fixture(scope="module")
def host():
    kept.append(socket.create_server(("127.0.0.1", 0)))

def test_uses_the_host(host):
    pass

def test_comes_last():
    pass
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    counts: dict[str, int]
    blamed: dict[str, str]  # test -> what it was told at its teardown


Run = Callable[[str], Outcome]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs test source in another pytest process with our conftest."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini(CONFIG)

    def run(source: str) -> Outcome:
        pytester.makepyfile(HEADER + source)
        result = pytester.runpytest_subprocess("-p", "tests.conftest", "-p", "no:cacheprovider", timeout=60)
        blamed = re.findall(r"_ ERROR at teardown of (\w+) _+\n((?:(?!_{3}).*\n)*)", result.stdout.str())
        return Outcome(counts=result.parseoutcomes(), blamed=dict(blamed))

    return run


def test_each_kind_of_leak_fails_the_test_that_leaked(run: Run) -> None:
    outcome = run(LEAKY)

    assert outcome.counts["passed"] == outcome.counts["errors"] == len(outcome.blamed) == LEAKY.count("test_")
    assert "left tasks running:\n  task 'Task-" in outcome.blamed["test_leaks_a_task"]
    assert "left tasks running:\n  task 'Task-" in outcome.blamed["test_leaks_a_task_of_its_fixture"]
    assert "(not a daemon), now at" in outcome.blamed["test_leaks_a_thread"]
    assert "(daemon), now at" in outcome.blamed["test_leaks_a_daemon_thread"]
    assert "time.sleep(20)" in outcome.blamed["test_leaks_a_process"]
    assert "time.sleep(20)" in outcome.blamed["test_leaks_a_grandchild_whose_parent_was_killed"]
    assert "SOCK_STREAM socket" in outcome.blamed["test_leaks_a_listening_socket"]
    assert "connected to 127.0.0.1" in outcome.blamed["test_leaks_a_connection"]
    assert "ValueError('escaped')" in outcome.blamed["test_leaks_an_error_in_a_task_that_nobody_awaits"]


def test_a_test_that_cleans_up_passes(run: Run) -> None:
    assert run(CLEAN) == Outcome(counts={"passed": 2}, blamed={})


def test_a_module_may_share_a_host_between_its_tests(run: Run) -> None:
    outcome = run(SHARED)

    assert outcome.counts == {"passed": 6, "errors": 1}
    assert list(outcome.blamed) == ["test_leaks_a_task_in_the_shared_loop"]


def test_a_fixture_of_a_module_that_leaks_fails_the_module(run: Run) -> None:
    outcome = run(LEAKY_MODULE)

    assert outcome.counts == {"passed": 2, "errors": 1}
    assert "this module left behind:\n  SOCK_STREAM socket" in outcome.blamed["test_comes_last"]


def test_a_test_that_hangs_in_its_loop_is_ended_in_time(run: Run) -> None:
    outcome = run(HANGING)

    assert outcome.counts == {"failed": 1, "passed": 1, "errors": 1}
    assert "Timeout (>1.0s) from pytest-timeout" in outcome.blamed["test_hangs"]

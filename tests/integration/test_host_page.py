"""Beside a host: the socket in its folder, and the door at which its page is started once somebody knocks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import sys
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import ConfigError, InvalidInputError, UnavailableError
from common.unix_socket import connected_unix_socket
from node.host.owner_socket import LIMITS, MAX_ASKED_BYTES, SOCKET_FILE, STATUS, ask, owner_told
from node.host.page_door import TOKEN_FILE, URL_FILE, PageAddress, page_address, page_door, page_listener
from tests.support.local_swarm import until

if TYPE_CHECKING:
    from pathlib import Path

HERE = PageAddress("127.0.0.1", 0)
PAGE = """
import os, signal, socket, sys
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
listener = socket.socket(fileno=int(words["--listen-fd"]))
listener.setblocking(True)
connection, _ = listener.accept()
connection.sendall(f"{os.getpid()} {sys.argv[1]} {words['--state']}\\n".encode())
if connection.recv(10) == b"stay":
    sys.stdin.read()
"""
SOON_S = 20.0


class Owner:
    """What a host is told at its socket."""

    def __init__(self) -> None:
        self.changes = list[Any]()
        self.refusal: Exception | None = None

    async def change(self, limits: object) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.changes.append(limits)

    def told(self) -> dict[str, Any]:
        return {"now_s": 1.0, "log": ["x" * 1000] * 100}


@pytest.mark.parametrize("depth", [0, 20], ids=["short path", "path too long for a socket"])
async def test_a_host_answers_at_a_socket_that_is_its_owners_alone(tmp_path: Path, depth: int) -> None:
    folder, owner = tmp_path.joinpath(*["folder"] * depth), Owner()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SOCKET_FILE).touch()  # as a host that was killed left it
    async with owner_told(folder, owner.told, owner.change):
        assert stat.S_IMODE((folder / SOCKET_FILE).stat().st_mode) == 0o600
        assert await ask(folder, STATUS) == owner.told()
        assert await ask(folder, LIMITS, {"max_memory": "2GB"}) == {}
        assert owner.changes == [{"max_memory": "2GB"}]
    assert not (folder / SOCKET_FILE).exists()
    with pytest.raises(UnavailableError, match="no host runs from this folder"):
        await ask(folder, STATUS)


async def test_what_a_host_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    owner = Owner()
    async with owner_told(tmp_path, owner.told, owner.change):
        for owner.refusal in (
            InvalidInputError("max_memory", "is too little"),
            ConfigError("max_memory: is too little"),
        ):
            with pytest.raises(InvalidInputError, match=r"^max_memory: is too little$"):
                await ask(tmp_path, LIMITS, {})
        with pytest.raises(InvalidInputError, match="ask: must be the status, or limits by name"):
            await ask(tmp_path, "anything")


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b"\xff\xfe\n", b"null\n", b"x" * (MAX_ASKED_BYTES + 10) + b"\n"])
async def test_what_makes_no_sense_at_the_socket_costs_the_host_nothing(tmp_path: Path, line: bytes) -> None:
    owner = Owner()
    async with owner_told(tmp_path, owner.told, owner.change):
        connection = await connected_unix_socket(tmp_path / SOCKET_FILE)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        writer.write(line)
        async with asyncio.timeout(SOON_S):
            try:
                answer = await reader.read()
            except ConnectionError:  # it has closed before all was read
                answer = b""
        writer.close()
        assert not answer or "error" in json.loads(answer)
        assert await ask(tmp_path, STATUS) == owner.told()
    assert owner.changes == []


async def test_a_folder_without_room_for_a_socket_is_told_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / SOCKET_FILE).mkdir()
    owner = Owner()
    async with owner_told(tmp_path, owner.told, owner.change):
        assert "so this host's page stays empty" in caplog.text


def knock(folder: Path, then: bytes) -> tuple[int, list[str]]:
    """Connect as a browser would, and wait for the page; its process id, and what it was told. Blocks."""
    port = int((folder / URL_FILE).read_text().split(":")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), SOON_S) as connection:
        pid, *told = connection.makefile().readline().split()
        connection.sendall(then)
        return int(pid), told


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


PROGRAM = (sys.executable, "-c", PAGE)


async def test_a_page_is_started_for_whoever_knocks_and_ends_with_its_host(tmp_path: Path) -> None:
    async with page_door(tmp_path, HERE, PROGRAM):
        for file in (TOKEN_FILE, URL_FILE):
            assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o600
        token = (tmp_path / TOKEN_FILE).read_text().strip()
        assert (tmp_path / URL_FILE).read_text().endswith(f"/enter?token={token}\n")
        first, told = await asyncio.to_thread(knock, tmp_path, b"go")
        assert told == ["page", str(tmp_path)]
        await until(lambda: not is_there(first), "the page that nobody needs has ended")
        second, _ = await asyncio.to_thread(knock, tmp_path, b"stay")
        assert second != first
        assert is_there(second)
    assert not is_there(second)
    assert not (tmp_path / URL_FILE).exists()


async def test_a_page_that_is_killed_costs_its_host_nothing_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.host.page_door.FAILED_PAUSE_S", 0.01)
    async with page_door(tmp_path, HERE, PROGRAM):
        killed, _ = await asyncio.to_thread(knock, tmp_path, b"stay")
        os.kill(killed, signal.SIGKILL)
        again, _ = await asyncio.to_thread(knock, tmp_path, b"go")
        assert again != killed
        assert "The page of this host ended with exit code -9; the host goes on" in caplog.text
        await until(lambda: not is_there(again), "the page has ended")


async def test_a_page_that_cannot_be_started_is_told_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with page_door(tmp_path, HERE, (str(tmp_path / "nothing"),)):
        port = int((tmp_path / URL_FILE).read_text().split(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port), SOON_S):
            await until(lambda: "The page of this host cannot be started" in caplog.text, "a warning")
        assert (tmp_path / URL_FILE).exists(), "the next who knocks is told the same"
    assert not (tmp_path / URL_FILE).exists()


async def test_a_port_that_is_taken_is_told_with_the_one_that_is_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with page_listener(HERE) as taken:
        port = taken.getsockname()[1]
        async with page_door(tmp_path, PageAddress("127.0.0.1", port), PROGRAM):
            found = int((tmp_path / URL_FILE).read_text().split(":")[2].partition("/")[0])
    assert found != port
    assert f"Port {port} is taken, so the page of this host is at port {found}" in caplog.text


async def test_a_token_that_others_can_read_leaves_a_host_without_its_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / TOKEN_FILE).write_text("0123456789abcdef\n")
    (tmp_path / TOKEN_FILE).chmod(0o644)
    async with page_door(tmp_path, HERE, PROGRAM):
        assert not (tmp_path / URL_FILE).exists()
    assert "The page of this host cannot be shown: " in caplog.text
    assert "other users can read it" in caplog.text


async def test_an_address_of_another_machine_leaves_a_host_without_its_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with page_door(tmp_path, PageAddress("192.0.2.1", 0), PROGRAM):
        pass
    assert "The page of this host cannot be shown: " in caplog.text


async def test_a_page_for_others_says_what_that_means(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with page_door(tmp_path, PageAddress("0.0.0.0", 0), PROGRAM):  # noqa: S104 - that is tested
        assert (tmp_path / URL_FILE).read_text().startswith("http://127.0.0.1:")
    assert "can be reached from elsewhere, unencrypted, by whoever has its token" in caplog.text


async def test_without_a_page_nothing_is_made(tmp_path: Path) -> None:
    async with page_door(tmp_path, None):
        assert not (tmp_path / TOKEN_FILE).exists()
        assert not (tmp_path / URL_FILE).exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("127.0.0.1:8090", PageAddress("127.0.0.1", 8090)),
        ("localhost:0", PageAddress("127.0.0.1", 0)),
        ("[::1]:8090", PageAddress("::1", 8090)),
        ("none", None),
    ],
)
def test_an_address_is_read_as_people_write_it(text: str, wanted: PageAddress | None) -> None:
    assert page_address(text, "--page-listen") == wanted


@pytest.mark.parametrize(
    "text", ["", "8090", "127.0.0.1", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:x", "a.example:1"]
)
def test_what_is_no_address_names_the_flag_and_an_example(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--page-listen: is .*, must be ADDRESS:PORT, such as 127\.0\.0\.1:8090, or none"
    ):
        page_address(text, "--page-listen")

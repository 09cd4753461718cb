"""What the pages' server answers: to whom, with what, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from common.web import event_stream as module
from common.web.files import HEADERS
from coordinator.dashboard.files import PAGES, web_files
from coordinator.dashboard.history import COLUMNS
from tests.support.dashboard import page_server
from tests.support.run_views import MANIFEST
from tests.support.trainer_events import PEERS

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import Message

    from tests.support.dashboard import PageServer

KEY = "page-0123456789abcdef"
API = ("overview", "join", "history", "peers", f"peer?id={PEERS[0]}", "layer?layer=0")
CREDIT = ("credit", "credit.csv", "credit.json")
SOON_S = 20.0


async def test_pages_and_what_belongs_to_them_are_served(tmp_path: Path) -> None:
    async with page_server(tmp_path) as server, server.client() as client:
        for path, file in web_files().items():
            answer = await client.get(path)
            assert (answer.status_code, answer.content) == (200, file.content), path
            assert answer.headers["content-type"] == file.media_type
            again = await client.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")


async def test_every_answer_is_held_to_the_policy(tmp_path: Path) -> None:
    paths = [*PAGES, "/static/style.css", "/nothing", "/api/peers?page=x", *(f"/api/{path}" for path in API)]
    async with page_server(tmp_path) as server, server.client() as client:
        answers = [await client.get(path) for path in paths]
        answers += [await client.post("/"), await client.get("/", headers={"Host": "evil.example"})]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert {answer.status_code for answer in answers} == {200, 400, 404, 405}


async def test_the_api_tells_of_the_run(tmp_path: Path) -> None:
    async with page_server(tmp_path) as server, server.client() as client:
        told = {path.partition("?")[0]: (await client.get(f"/api/{path}")).json() for path in API}
    assert told["overview"]["run_id"] == MANIFEST.run_id
    assert told["overview"]["figures"]["peers"]["host"] == 6
    assert told["join"]["invite"] == "kh1x"
    assert told["history"]["figures"].keys() == set(COLUMNS)
    assert told["history"]["t_s"] == [1000]
    assert told["history"]["evaluations"] == {"tokens": [0, 20_480], "bits_per_byte": [8, 4]}
    assert told["peers"]["total"] == 9
    assert told["peer"]["peer_id"] == PEERS[0]
    assert told["layer"]["figures"]["blocks"] == 16


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/api/overview", "/api/events", "/static/style.css"])
async def test_nothing_can_be_done_but_look(tmp_path: Path, method: str, path: str) -> None:
    async with page_server(tmp_path) as server, server.client() as client:
        assert (await client.request(method, path)).status_code == 405


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("peers?page=x", 400, "query.page: "),
        ("peers?role=king", 400, "query.role: "),
        ("credit?kind=kings", 400, "query.kind: "),
        ("peers?search=" + "x" * 101, 400, "search: must be at most 100 characters"),
        ("history?span=ever", 400, "query.span: "),
        ("peer", 400, "query.id: "),
        ("peer?id=nobody", 404, "id: no such peer is announced now"),
        ("layer?layer=2", 400, "layer: must be from 0 to 1, is 2"),
        ("layer?layer=-1", 400, "layer: must be from 0 to 1, is -1"),
        ("nothing", 404, "Not Found"),
    ],
)
async def test_what_makes_no_sense_is_one_sentence(tmp_path: Path, query: str, status: int, words: str) -> None:
    async with page_server(tmp_path) as server, server.client() as client:
        answer = await client.get(f"/api/{query}")
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


async def test_a_body_is_refused(tmp_path: Path) -> None:
    async with page_server(tmp_path) as server, server.client() as client:
        answer = await client.request("GET", "/api/overview", content=b"x" * 100)
    assert answer.status_code == 413


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.0.2.1", ""])
async def test_a_page_of_somebody_else_cannot_look_through_a_name_of_its_own(tmp_path: Path, host: str) -> None:
    async with page_server(tmp_path) as server, server.client(Host=host) as client:
        for path in ("/", "/api/overview", "/api/events", "/health"):
            answer = await client.get(path)
            assert (answer.status_code, "names of its own machine" in answer.text) == (400, True)


async def test_with_a_key_pages_are_open_and_the_run_is_not(tmp_path: Path) -> None:
    async with page_server(tmp_path, key=KEY) as server:
        async with server.client(Host="runs.example.org") as client:
            open_to_all = [*web_files(), "/health"]
            assert {(await client.get(path)).status_code for path in open_to_all} == {200}
            refused = [await client.get(f"/api/{path}") for path in (*API, *CREDIT, "events")]
        assert {answer.status_code for answer in refused} == {401}
        assert KEY not in "".join(answer.text for answer in refused)
        async with server.client(Authorization=f"Bearer {KEY}") as client:
            assert {(await client.get(f"/api/{path}")).status_code for path in (*API, *CREDIT)} == {200}


async def test_the_health_tells_whether_the_run_is_seen(tmp_path: Path) -> None:
    async with page_server(tmp_path) as server, server.client() as client:
        assert (await client.get("/health")).status_code == 200
        server.directory.problem = "dht: no answer"
        await server.watch.look()
        answer = await client.get("/health")
    assert (answer.status_code, answer.json()["message"]) == (503, "dht: no answer")


class Stream:
    """An open page on the level of ASGI, which takes what it is sent only when a test says so."""

    def __init__(self, server: PageServer) -> None:
        self.parts: asyncio.Queue[bytes] = asyncio.Queue()
        self.status = 0
        self.takes, self.closed = asyncio.Event(), asyncio.Event()
        self.takes.set()
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "path": "/api/events",
            "raw_path": b"/api/events",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "scheme": "http",
            "server": ("localhost", 80),
            "client": ("127.0.0.1", 1),
        }
        self._asked = False
        self.task = asyncio.create_task(server.app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.closed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.takes.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.parts.put_nowait(message.get("body", b""))

    async def overview(self) -> dict[str, Any]:
        """The next one."""
        async with asyncio.timeout(SOON_S):
            while not (part := await self.parts.get()).startswith(b"event: overview\ndata: "):
                pass
        found: dict[str, Any] = json.loads(part.partition(b"data: ")[2])
        return found

    async def close(self) -> None:
        self.closed.set()
        self.takes.set()
        async with asyncio.timeout(SOON_S):
            await self.task


async def test_an_open_page_is_told_of_every_look_until_it_is_closed(tmp_path: Path) -> None:
    async with page_server(tmp_path) as server:
        page = Stream(server)
        assert (await page.overview())["figures"]["taken_s"] == 1000
        server.directory.later(2)
        await server.watch.look()
        assert (await page.overview())["figures"]["taken_s"] == 1002
        assert server.feed.n_clients == 1
        await page.close()
        assert server.feed.n_clients == 0


async def test_a_page_without_news_is_sent_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NO_NEWS_S", 0.01)
    async with page_server(tmp_path) as server:
        page = Stream(server)
        await page.overview()
        assert await asyncio.wait_for(page.parts.get(), SOON_S) == b": nothing new\n\n"
        await page.close()


async def test_more_pages_than_may_be_open_are_told_when_to_come_again(tmp_path: Path) -> None:
    async with page_server(tmp_path, max_clients=2) as server, server.client() as client:
        pages = [Stream(server) for _ in range(2)]
        for page in pages:
            await page.overview()
        answer = await client.get("/api/events")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "15")
        assert "2 pages are kept up to date already" in answer.json()["error"]["message"]
        await pages[0].close()
        third = Stream(server)
        await third.overview()
        for page in (pages[1], third):
            await page.close()


async def test_a_page_that_takes_nothing_is_dropped_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLOW_S", 0.02)
    async with page_server(tmp_path) as server:
        slow, other = Stream(server), Stream(server)
        for page in (slow, other):
            await page.overview()
        slow.takes.clear()
        await server.watch.look()
        async with asyncio.timeout(SOON_S):
            await slow.task
        assert server.feed.n_clients == 1
        await server.watch.look()
        await other.overview()
        await other.close()


async def test_pages_end_when_the_server_does(tmp_path: Path) -> None:
    async with page_server(tmp_path) as server:
        page = Stream(server)
        await page.overview()
        server.feed.end()
        async with asyncio.timeout(SOON_S):
            await page.task
        assert server.feed.n_clients == 0

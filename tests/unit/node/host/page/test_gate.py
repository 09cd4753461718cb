"""Who may look at a host's page, and who may act there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from common.web.feed import Feed
from common.web.files import HEADERS
from node.host.page import app as module
from node.host.page.app import MAX_BODY_BYTES, ShownHost, build_app, page_files
from node.host.page.gate import GateConfig, local_names

if TYPE_CHECKING:
    from pathlib import Path

PORT = 8090
TOKEN = "token-0123456789abcdef"  # noqa: S105 - of this test
GATE = GateConfig(token=TOKEN, names=local_names(PORT), port=PORT)
BASE = f"http://127.0.0.1:{PORT}"
ENTER = f"/enter?token={TOKEN}"
ACTIONS = {"limits": {"limits": {"max_memory": ""}}, "pause": {"seconds": 60}, "resume": {}, "leave": {}}
FROM_HERE = {"Origin": BASE, "X-Kilohive-Page": GATE.act_key}
KNOWN = {"Cookie": f"{GATE.cookie_name}={GATE.cookie}"}


class Server:
    """A page's server, and what it was asked to do."""

    def __init__(self, folder: Path, gate: GateConfig = GATE) -> None:
        self.done = list[Any]()
        self.app = build_app(ShownHost(folder=folder, feed=Feed(4), soon=lambda: None), gate)

    def client(self, base: str = BASE, **headers: str) -> httpx.AsyncClient:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=base, headers=named)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(tmp_path)

    async def ask(_folder: Path, what: str, limits: object) -> dict[str, Any]:
        made.done.append((what, limits))
        return {}

    async def ask_host(_config: object, word: str, duration_s: float | None = None) -> Any:
        made.done.append((word, duration_s))
        return type("Heard", (), {"reasons": (), "until_s": None})

    monkeypatch.setattr(module, "ask", ask)
    monkeypatch.setattr(module, "ask_host", ask_host)
    return made


async def test_the_token_is_exchanged_for_a_cookie_that_no_script_and_no_other_site_has(server: Server) -> None:
    async with server.client() as client:
        entered = await client.get(ENTER)
        assert (entered.status_code, entered.headers["location"]) == (303, "./")
        (cookie,) = entered.headers.get_list("set-cookie")
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
        assert TOKEN not in cookie
        assert (await client.get("/")).status_code == 200


@pytest.mark.parametrize("query", ["", "?token=", "?token=x", f"?token={TOKEN}x", "?tokn=" + TOKEN, "?" + "a" * 5000])
async def test_another_token_lets_nobody_in(server: Server, query: str) -> None:
    async with server.client() as client:
        answer = await client.get(f"/enter{query}")
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "cookie",
    [
        "",
        "kilohive-page-8090=",
        f"kilohive-page-8090={TOKEN}",
        f"kilohive-page-9999={GATE.cookie}",
        f"kilohive-page-8090={GATE.act_key}",
        "kilohive-page-8090=\xff",
        ";;=;",
    ],
)
async def test_without_the_cookie_nothing_is_told_and_nothing_done(server: Server, cookie: str) -> None:
    headers = [(b"Cookie", cookie.encode("latin-1"))]
    headers += [(name.encode(), value.encode()) for name, value in FROM_HERE.items()]
    async with server.client() as client:
        answers = [await client.get(path, headers=headers) for path in (*page_files(), "/api/events", "/nothing")]
        answers += [await client.post(f"/api/{path}", json=body, headers=headers) for path, body in ACTIONS.items()]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert not any(secret in answers[0].text for secret in (TOKEN, GATE.cookie, GATE.act_key))
    assert server.done == []


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        f"evil.example:{PORT}",
        f"127.0.0.1.evil.example:{PORT}",
        f"localhost.evil.example:{PORT}",
        "127.0.0.1:8091",
        "127.0.0.1",
        f"192.0.2.1:{PORT}",
        "",
    ],
)
async def test_a_name_that_was_turned_to_this_machine_is_not_answered_to(server: Server, host: str) -> None:
    async with server.client(Host=host, Origin=f"http://{host}", X_Kilohive_Page=GATE.act_key, **KNOWN) as client:
        answers = [await client.get(path) for path in ("/", ENTER, "/api/events", "/static/style.css")]
        answers += [await client.post(f"/api/{path}", json=body) for path, body in ACTIONS.items()]
    assert {answer.status_code for answer in answers} == {400}
    assert not any("set-cookie" in answer.headers for answer in answers)
    assert server.done == []


@pytest.mark.parametrize("host", [f"127.0.0.1:{PORT}", f"localhost:{PORT}", f"LOCALHOST:{PORT}", f"[::1]:{PORT}"])
async def test_every_name_of_this_machine_is_answered_to(server: Server, host: str) -> None:
    async with server.client(Host=host, **KNOWN) as client:
        assert (await client.get("/")).status_code == 200


def test_at_the_port_of_http_names_stand_without_it() -> None:
    assert local_names(80) >= {"127.0.0.1", "localhost", "[::1]", "localhost:80"}
    assert "localhost" not in local_names(PORT)


async def test_a_page_for_others_answers_to_any_name_and_only_to_who_has_the_token(tmp_path: Path) -> None:
    server = Server(tmp_path, GateConfig(token=TOKEN, names=frozenset(), port=PORT))
    async with server.client(base="http://machine.example.org") as client:
        assert (await client.get("/")).status_code == 401
        assert (await client.get(ENTER)).status_code == 303
        assert (await client.get("/")).status_code == 200


@pytest.mark.parametrize("action", ACTIONS)
async def test_the_page_itself_can_act(server: Server, action: str) -> None:
    async with server.client(**KNOWN) as client:
        answer = await client.post(f"/api/{action}", json=ACTIONS[action], headers=FROM_HERE)
    assert answer.status_code == 200, answer.text
    assert server.done == [
        {"limits": ("limits", {"max_memory": ""}), "pause": ("pause", 60.0)}.get(action, (action, None))
    ]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": BASE},
        {"X-Kilohive-Page": GATE.act_key},
        {"Origin": BASE, "X-Kilohive-Page": ""},
        {"Origin": BASE, "X-Kilohive-Page": GATE.cookie},
        {"Origin": "http://evil.example", "X-Kilohive-Page": GATE.act_key},
        {"Origin": "http://127.0.0.1:8091", "X-Kilohive-Page": GATE.act_key},
        {"Origin": f"http://localhost:{PORT}", "X-Kilohive-Page": GATE.act_key},
        {"Origin": "null", "X-Kilohive-Page": GATE.act_key},
    ],
)
async def test_no_other_page_acts_in_the_owners_name(server: Server, action: str, headers: dict[str, str]) -> None:
    async with server.client(**KNOWN) as client:
        answer = await client.post(f"/api/{action}", json=ACTIONS[action], headers=headers)
    assert answer.status_code == 403
    assert server.done == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_actions_are_posts(server: Server, method: str) -> None:
    async with server.client(**KNOWN) as client:
        answers = [await client.request(method, f"/api/{action}", headers=FROM_HERE) for action in ACTIONS]
    assert {answer.status_code for answer in answers} == {405}
    assert server.done == []


@pytest.mark.parametrize(
    ("action", "body", "status", "words"),
    [
        ("pause", {"seconds": 0}, 400, "seconds: "),
        ("pause", {"seconds": 40 * 86_400}, 400, "seconds: "),
        ("pause", {"seconds": "60"}, 400, "seconds: "),
        ("pause", {"second": 60}, 400, "second: "),
        ("limits", {}, 400, "limits: "),
        ("limits", {"limits": {"max_memory": ["1GB"]}}, 400, "limits.max_memory"),
        ("limits", {"limits": {"max_memory": "x" * MAX_BODY_BYTES}}, 413, "the body is over the limit"),
        ("leave", [], 400, "the body must be a JSON object"),
    ],
)
async def test_a_body_that_makes_no_sense_or_is_too_large_is_one_sentence(
    server: Server, action: str, body: object, status: int, words: str
) -> None:
    async with server.client(**KNOWN) as client:
        answer = await client.post(f"/api/{action}", json=body, headers=FROM_HERE)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert server.done == []


async def test_a_body_of_another_kind_is_refused(server: Server) -> None:
    async with server.client(**KNOWN) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            headers = {**FROM_HERE, "Content-Type": kind}
            answer = await client.post("/api/leave", content=json.dumps({}).encode(), headers=headers)
            assert answer.status_code == 400, kind
    assert server.done == []


async def test_every_answer_forbids_frames_and_scripts_from_elsewhere(server: Server) -> None:
    async with server.client() as client:
        answers = [await client.get(path) for path in ("/", "/enter", ENTER, "/nothing")]
        answers.append(await client.get("/", headers={"Host": "evil.example"}))
        answers.append(await client.get("/", headers=KNOWN))
        answers.append(await client.post("/api/leave", headers=KNOWN))
        answers.append(await client.post("/api/leave", json={}, headers={**KNOWN, **FROM_HERE}))
    for answer in answers:
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert {answer.status_code for answer in answers} == {200, 303, 400, 401, 403, 404}


def test_pages_of_several_hosts_have_cookies_of_their_own_and_each_secret_another_use() -> None:
    other = GateConfig(token=TOKEN, names=local_names(8091), port=8091)
    assert other.cookie_name != GATE.cookie_name
    assert len({TOKEN, GATE.cookie, GATE.act_key}) == 3

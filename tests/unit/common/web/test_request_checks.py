"""What a request passes before it is parsed: whom it is for, whose it is, how large it is, how long it takes."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from common.web import request_checks
from common.web.request_checks import CheckConfig, RequestChecks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Message, Receive, Scope, Send

KEY = "sk-0123456789abcdef"
PATHS = frozenset({"/", "/health", "/v1/models"})


class Inside:
    """The application behind the checks: it keeps what bodies it got, and answers 200."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.after: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        self.after.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


def checks(inside: Inside | None = None, **changes: Any) -> RequestChecks:
    return RequestChecks(inside or Inside(), CheckConfig(**{"max_body_bytes": 10, **changes}), PATHS)


async def ask(
    app: RequestChecks,
    path: str = "/v1/models",
    headers: Sequence[tuple[bytes, bytes]] = (),
    parts: Sequence[bytes] = (b"",),
) -> tuple[int, str]:
    """Status and message of the answer to a request whose body comes in `parts`; then the client hangs up."""
    incoming: list[Message] = [
        {"type": "http.request", "body": part, "more_body": at < len(parts) - 1} for at, part in enumerate(parts)
    ]
    incoming.append({"type": "http.disconnect"})
    answer: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        answer.append(message)

    await app({"type": "http", "path": path, "headers": list(headers)}, receive, send)
    body = answer[1]["body"]
    return answer[0]["status"], body.decode() if body == b"inside" else json.loads(body)["error"]["message"]


def bearer(key: str, scheme: str = "Bearer") -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"{scheme} {key}".encode())]


async def test_who_has_the_key_is_let_in() -> None:
    for scheme in ("Bearer", "bearer"):
        assert await ask(checks(key=KEY), headers=bearer(KEY, scheme)) == (200, "inside")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer(""),
        bearer(KEY[:-1]),
        bearer(f"{KEY}x"),
        bearer(KEY.upper()),
        bearer(KEY, "Basic"),
        [(b"authorization", KEY.encode())],
        [(b"authorization", b"\xff\xfe")],
    ],
)
async def test_who_has_not_is_told_how_to_send_it(headers: list[tuple[bytes, bytes]]) -> None:
    status, message = await ask(checks(key=KEY), headers=headers)
    assert status == 401
    assert "Authorization: Bearer KEY" in message
    assert KEY not in message


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/health", 200), ("/metrics", 401), ("/nothing", 401), ("//", 401)]
)
async def test_the_page_and_the_health_need_no_key_and_all_else_does(path: str, status: int) -> None:
    assert (await ask(checks(key=KEY), path))[0] == status


async def test_a_server_says_which_of_its_paths_need_no_key() -> None:
    app = checks(key=KEY, for_all=frozenset({"/style.css"}))
    assert [(await ask(app, path))[0] for path in ("/style.css", "/", "/style.css/")] == [200, 401, 401]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost:8000", 200),
        (b"LOCALHOST", 200),
        (b"127.0.0.1:8000", 200),
        (b"[::1]:8000", 200),
        (b"evil.example", 400),
        (b"localhost.evil.example", 400),
        (b"[::2]:8000", 400),
        (b"", 400),
    ],
)
async def test_without_a_key_only_names_of_this_machine_are_answered_to(host: bytes, status: int) -> None:
    app = checks(hosts=frozenset({"localhost", "127.0.0.1", "::1"}))
    assert (await ask(app, "/health", [(b"host", host)]))[0] == status


async def test_a_body_is_whole_before_the_application_hears_of_it_and_then_the_client_may_hang_up() -> None:
    inside = Inside()
    assert (await ask(checks(inside), parts=[b"012", b"", b"3456789"]))[0] == 200
    assert inside.bodies == [b"0123456789"]
    assert inside.after == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("parts", [[b"0123456789A"], [b"01234", b"56789A"], [b"x"] * 1000, [b"x" * 1000] * 2])
async def test_a_body_over_the_limit_is_refused_and_never_kept(parts: list[bytes]) -> None:
    inside = Inside()
    status, message = await ask(checks(inside), parts=parts)
    assert (status, message) == (413, "the body is over the limit of 10 bytes")
    assert inside.bodies == []


async def test_bodies_of_all_requests_together_are_bounded_and_make_room_when_they_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_checks, "MAX_HELD", 2)
    begun, answered = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await answered.wait()
        await Inside()(scope, receive, send)

    app = RequestChecks(slow, CheckConfig(max_body_bytes=10), PATHS)
    first = asyncio.create_task(ask(app, parts=[b"0123456789"]))
    await begun.wait()
    second = asyncio.create_task(ask(app, parts=[b"01234", b"567"]))
    while app.held_bytes < 18:  # noqa: ASYNC110 - what it waits for has no event
        await asyncio.sleep(0)
    assert await ask(app, parts=[b"01", b"2"]) == (429, "requests of 20 bytes are not answered yet, which are the most")
    answered.set()
    assert [(await task)[0] for task in (first, second)] == [200, 200]
    assert app.held_bytes == 0
    assert (await ask(app, parts=[b"0123456789"]))[0] == 200


async def test_a_body_that_is_cut_short_never_reaches_the_application() -> None:
    inside = Inside()
    answer: list[Message] = []
    incoming: list[Message] = [
        {"type": "http.request", "body": b"01", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        answer.append(message)

    await checks(inside)({"type": "http", "path": "/", "headers": []}, receive, send)
    assert answer[0]["status"] == 400
    assert inside.bodies == []


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_checks, "BODY_S", 0.02)
    answer: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answer.append(message)

    await checks()({"type": "http", "path": "/", "headers": []}, receive, send)
    assert answer[0]["status"] == 408


async def test_a_client_that_takes_nothing_of_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_checks, "SEND_S", 0.02)
    sent: list[str] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    await checks()({"type": "http", "path": "/", "headers": []}, receive, send)
    assert sent == ["http.response.start", "http.response.body"]


async def test_answers_are_counted_by_path_and_status_and_strange_paths_as_one() -> None:
    app = checks(key=KEY)
    for path in ("/v1/models", "/x/1", "/x/2", "/health"):
        await ask(app, path)
    assert app.answered == {("/v1/models", 401): 1, ("", 401): 2, ("/health", 200): 1}


async def test_what_is_not_http_is_not_answered() -> None:
    async def never(*_: object) -> Any:
        pytest.fail("nothing is received or sent")

    await checks()({"type": "websocket", "path": "/", "headers": []}, never, never)

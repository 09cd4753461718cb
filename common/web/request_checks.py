"""What every request passes before it is parsed: whom it is for, whose it is, how large it is, and how long it takes.

Path of a request: uvicorn -> **request_checks** -> the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.web.http_errors import BAD_REQUEST, OVERLOADED, TOO_MANY, UNAUTHORIZED, UNKNOWN_KEY, HttpError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOR_ALL: Final = frozenset({"/", "/health"})
"""Paths that need no key unless told otherwise: a page has nothing in it but the page, and supervisors have no key."""
BODY_S = 30.0
SEND_S = 60.0
MAX_HELD = 64
"""So many times the largest body is kept of all requests together, until they are answered."""
MAX_DISCARDED = 8
"""So many times the largest body is read and thrown away, so that its sender reads why it is refused."""
TOO_SLOW, TOO_LARGE = 408, 413


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """`key`: what callers must have, none if empty. `hosts`: names that a request may be for; any if empty.

    `for_all`: paths that need no key.

    Without a key, a page of somebody else's that has its name looked up as this machine would be let in: only names
    of this machine are.
    """

    key: str = ""
    hosts: frozenset[str] = frozenset()
    max_body_bytes: int
    for_all: frozenset[str] = FOR_ALL


class _StalledError(Exception):
    """A client that takes nothing of its answer; nobody is left to be told."""


class RequestChecks:
    """An ASGI application around another. `answered` counts answers by path and status; a path that is not there is ''.

    A body is whole, and within its bounds, before the application hears of the request. `held_bytes` are those of all
    requests that are not answered yet.
    """

    def __init__(self, app: ASGIApp, config: CheckConfig, paths: frozenset[str]) -> None:
        self._app, self._config, self._paths = app, config, paths
        self._key = hashlib.sha256(config.key.encode()).digest() if config.key else b""
        self.answered: Counter[tuple[str, int]] = Counter()
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer in the application's place."""
        if scope["type"] != "http":
            return
        send = self._counting(scope["path"], send)
        error, body = self._refused(scope), bytearray()
        try:
            error = error or await self._read(receive, body)
            with contextlib.suppress(_StalledError):
                if error is None:
                    await self._app(scope, _again(bytes(body), receive), send)
                else:
                    await error.response()(scope, receive, send)
        finally:
            self.held_bytes -= len(body)

    def _refused(self, scope: Scope) -> HttpError | None:
        headers = dict(scope["headers"])
        if self._config.hosts and _host_name(headers.get(b"host", b"")) not in self._config.hosts:
            why = "this server answers to names of its own machine only; give it --key-file to be called by others"
            return HttpError(status=BAD_REQUEST, message=f"Host: {why}")
        if not self._key or scope["path"] in self._config.for_all:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        is_known = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._key)
        if scheme.lower() == b"bearer" and is_known:
            return None
        message = "send the key of this server in the header Authorization: Bearer KEY"
        return HttpError(status=UNAUTHORIZED, message=message, kind=UNKNOWN_KEY, code="invalid_api_key")

    async def _read(self, receive: Receive, body: bytearray) -> HttpError | None:
        """Read a body into `body`, or say why not; one that is too large is read on, to be thrown away."""
        limit, size = self._config.max_body_bytes, 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return HttpError(status=BAD_REQUEST, message="the body is cut short")
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= limit and (error := self._hold(part, body)):
                        return error
                    if not message.get("more_body", False) or size > limit * MAX_DISCARDED:
                        break
        except TimeoutError:
            return HttpError(status=TOO_SLOW, message=f"the body took longer than {BODY_S:g} s")
        if size > limit:
            return HttpError(status=TOO_LARGE, message=f"the body is over the limit of {limit:,} bytes")
        return None

    def _hold(self, part: bytes, body: bytearray) -> HttpError | None:
        limit = self._config.max_body_bytes * MAX_HELD
        if self.held_bytes + len(part) > limit:
            message = f"requests of {limit:,} bytes are not answered yet, which are the most"
            return HttpError(status=TOO_MANY, message=message, kind=OVERLOADED, code="queue_full", retry_s=1.0)
        self.held_bytes += len(part)
        body += part
        return None

    def _counting(self, path: str, send: Send) -> Send:
        known = path if path in self._paths else ""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered[known, message["status"]] += 1
            try:
                async with asyncio.timeout(SEND_S):
                    await send(message)
            except TimeoutError:
                raise _StalledError from None

        return counting


def _again(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the whole body first, then what comes after it."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _host_name(header: bytes) -> str:
    """The name in a Host header, without its port and the brackets of IPv6."""
    text = header.decode("latin-1").lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]

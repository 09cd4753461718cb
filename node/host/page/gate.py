"""Who may look at a host's page, and who may act: its owner, on this machine, in a browser that was given the token.

Path of a request: uvicorn -> WithHeaders -> **gate** -> common.web.request_checks -> app. The token comes once, in the
address that the host prints, and is exchanged for a cookie that no script reads and no other site's page sends. What
changes something is taken from this server's own page alone, with a word that only that page has been told.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse, RedirectResponse

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

ENTER: Final = "/enter"
ACT_HEADER: Final = b"x-kilohive-page"
LOOKING: Final = frozenset({"GET", "HEAD"})
COOKIE_S: Final = 30 * 86_400
HTTP_PORT: Final = 80
SEE_OTHER, BAD_REQUEST, UNAUTHORIZED, FORBIDDEN = 303, 400, 401, 403

WRONG_HOST: Final = "Host: this page answers to names of its own machine only\n"
LOCKED: Final = (
    "This page is for this machine's owner: open the address with the token that its host has printed, which is also "
    "in the file page.url of the host's folder.\n"
)
NOT_FROM_HERE: Final = "only this server's own page can change anything\n"


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """`names`: values of Host that are answered to; any if empty. `port`: where it listens."""

    token: str
    names: frozenset[str]
    port: int

    @property
    def cookie_name(self) -> str:
        """Browsers send cookies to every port of a machine: pages of several hosts have one each."""
        return f"kilohive-page-{self.port}"

    @property
    def cookie(self) -> str:
        """What a browser shows that was let in. The token cannot be told from it."""
        return self._made_of("cookie")

    @property
    def act_key(self) -> str:
        """What the page says with each action."""
        return self._made_of("actions")

    def _made_of(self, purpose: str) -> str:
        return hmac.new(self.token.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def local_names(port: int) -> frozenset[str]:
    """What a browser on this machine calls a server at that port."""
    hosts = ("127.0.0.1", "localhost", "[::1]")
    without_port = hosts if port == HTTP_PORT else ()
    return frozenset({*(f"{host}:{port}" for host in hosts), *without_port})


class PageGate:
    """An ASGI application around another, which hears only of requests that may be answered."""

    def __init__(self, app: ASGIApp, config: GateConfig) -> None:
        self._app, self._config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, let a browser in, or refuse."""
        if scope["type"] != "http":
            return
        answer = self._answer(scope)
        if answer is None:
            await self._app(scope, receive, send)
        else:
            await answer(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        """What is answered in the application's place; None for what may pass."""
        headers = dict(scope["headers"])
        if self._config.names and headers.get(b"host", b"").decode("latin-1").lower() not in self._config.names:
            return PlainTextResponse(WRONG_HOST, BAD_REQUEST)
        if scope["path"] == ENTER and scope["method"] == "GET":
            return self._enter(scope["query_string"])
        if not self._is_known(headers.get(b"cookie", b"")):
            return PlainTextResponse(LOCKED, UNAUTHORIZED)
        if scope["method"] not in LOOKING and not self._is_from_here(headers):
            return PlainTextResponse(NOT_FROM_HERE, FORBIDDEN)
        return None

    def _enter(self, query: bytes) -> Response:
        """Exchange the token for the cookie; the address that is shown then has no token in it."""
        config = self._config
        given = parse_qs(query.decode("latin-1"), max_num_fields=8).get("token", [""])[0] if len(query) < 4096 else ""  # noqa: PLR2004 - far longer than a token
        if not _same(given, config.token):
            return PlainTextResponse(LOCKED, UNAUTHORIZED)
        answer = RedirectResponse("./", SEE_OTHER, {"Cache-Control": "no-store"})
        answer.set_cookie(config.cookie_name, config.cookie, max_age=COOKIE_S, httponly=True, samesite="strict")
        return answer

    def _is_known(self, header: bytes) -> bool:
        try:
            cookies = SimpleCookie(header.decode("latin-1"))
        except CookieError:
            return False
        shown = cookies.get(self._config.cookie_name)
        return shown is not None and _same(shown.value, self._config.cookie)

    def _is_from_here(self, headers: dict[bytes, bytes]) -> bool:
        """A browser names the origin of every page that sends a POST, and lets none but its own add that header."""
        host, origin = headers.get(b"host", b""), headers.get(b"origin", b"")
        is_own = bool(host) and origin in {b"http://" + host, b"https://" + host}
        return is_own and _same(headers.get(ACT_HEADER, b"").decode("latin-1"), self._config.act_key)


def _same(given: str, wanted: str) -> bool:
    """In the same time for whatever was given."""
    return hmac.compare_digest(*(hashlib.sha256(text.encode()).digest() for text in (given, wanted)))

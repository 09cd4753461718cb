"""The pages' own files, read from the package once, and what a browser is told about them.

A page is its own part within `layout.html`, which is the same for all, and a script of the same name. Pages have
nothing of the run in them; their scripts ask for it. Nothing comes from another server.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Final, NamedTuple

from starlette.datastructures import MutableHeaders
from starlette.responses import Response

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLDER: Final = "pages"
STATIC: Final = "/static/"
LAYOUT: Final = "layout.html"
HERE: Final = ' aria-current="page"'


class DashboardPage(NamedTuple):
    """A page by the name of its part and of its script; `title` is that of the browser's window."""

    name: str
    title: str


PAGES: Final = {
    "/": DashboardPage("overview", "Kilohive: the run"),
    "/peers": DashboardPage("peers", "Kilohive: peers"),
    "/peer": DashboardPage("peer", "Kilohive: a peer"),
    "/layer": DashboardPage("layer", "Kilohive: a layer"),
}
"""Where each page is served. Which peer or layer a page shows is in its query, which the server does not read."""
MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer. Scripts and styles are files of this server, none is in a page."""
NOT_MODIFIED: Final = 304


@dataclass(frozen=True, kw_only=True)
class WebFile:
    """One file as it is served; `tag` names its content, so that a browser fetches it once."""

    content: bytes
    media_type: str
    tag: str

    def response(self, known: str | None) -> Response:
        """The file, or that it is still the one that the browser's If-None-Match names."""
        headers = {"ETag": self.tag, "Cache-Control": "no-cache"}
        if known is not None and self.tag in known:
            return Response(status_code=NOT_MODIFIED, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def web_files() -> dict[str, WebFile]:
    """Every page and what belongs to it, by the path under which it is served."""
    folder = files(__package__).joinpath(FOLDER)
    layout = Template(folder.joinpath(LAYOUT).read_text(encoding="utf-8"))
    pages = {path: _page(folder, layout, page) for path, page in PAGES.items()}
    static = [(name, file) for name, file in _below(folder) if not name.endswith(".html")]
    return pages | {f"{STATIC}{name}": _web_file(name, file.read_bytes()) for name, file in static}


class WithHeaders:
    """An ASGI application that puts HEADERS on every answer of another."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _below(folder: Traversable, prefix: str = "") -> list[tuple[str, Traversable]]:
    """Files that are served, with their names from `folder` on."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _below(entry, f"{prefix}{entry.name}/")
        elif _suffix(entry.name) in MEDIA_TYPES:
            found.append((f"{prefix}{entry.name}", entry))
    return found


def _page(folder: Traversable, layout: Template, page: DashboardPage) -> WebFile:
    name = f"{page.name}.html"
    html = layout.substitute(
        title=page.title,
        name=page.name,
        in_run=HERE if page.name == "overview" else "",
        in_peers=HERE if page.name == "peers" else "",
        main=folder.joinpath(name).read_text(encoding="utf-8"),
    )
    return _web_file(name, html.encode())


def _web_file(name: str, content: bytes) -> WebFile:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return WebFile(content=content, media_type=MEDIA_TYPES[_suffix(name)], tag=tag)


def _suffix(name: str) -> str:
    return f".{name.rpartition('.')[2]}"

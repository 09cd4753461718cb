"""Files that a server gives to browsers: read from packages once, and what a browser is told about them.

Styles and modules that all pages share are in `pages/` here; a package with pages has those of its own in a folder of
the same name. Nothing comes from another server.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from starlette.datastructures import MutableHeaders
from starlette.requests import Request  # noqa: TC002 - FastAPI reads the annotation
from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from importlib.resources.abc import Traversable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLDER: Final = "pages"
STATIC: Final = "/static/"
HTML: Final = ".html"
MEDIA_TYPES: Final = {
    HTML: "text/html; charset=utf-8",
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


def pages_of(package: str) -> Traversable:
    """The folder in which a package has its pages."""
    return files(package).joinpath(FOLDER)


def static_files(package: str) -> dict[str, WebFile]:
    """What the pages of `package` load, its own and what all share, by the path under which it is served."""
    found = [named for name in (__package__, package) for named in _below(pages_of(name))]
    return {f"{STATIC}{name}": web_file(name, file.read_bytes()) for name, file in found if not name.endswith(HTML)}


def web_file(name: str, content: bytes) -> WebFile:
    """The content of a file whose name tells its type."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return WebFile(content=content, media_type=MEDIA_TYPES[_suffix(name)], tag=tag)


def file_endpoint(served: Mapping[str, WebFile]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint for the path of each file."""

    async def file(request: Request) -> Response:
        return served[request.url.path].response(request.headers.get("if-none-match"))

    return file


def _below(folder: Traversable, prefix: str = "") -> list[tuple[str, Traversable]]:
    """Files that are served, with their names from `folder` on."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _below(entry, f"{prefix}{entry.name}/")
        elif _suffix(entry.name) in MEDIA_TYPES:
            found.append((f"{prefix}{entry.name}", entry))
    return found


def _suffix(name: str) -> str:
    return f".{name.rpartition('.')[2]}"

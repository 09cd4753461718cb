"""The pages of a run, read from the package once.

A page is its own part within `layout.html`, which is the same for all, and a script of the same name. Pages have
nothing of the run in them; their scripts ask for it.
"""

from __future__ import annotations

from string import Template
from typing import TYPE_CHECKING, Final, NamedTuple

from common.web.files import WebFile, pages_of, static_files, web_file

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

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
    "/credit": DashboardPage("credit", "Kilohive: credit"),
    "/layer": DashboardPage("layer", "Kilohive: a layer"),
}
"""Where each page is served. Which peer or layer a page shows is in its query, which the server does not read."""


def web_files() -> dict[str, WebFile]:
    """Every page and what belongs to it, by the path under which it is served."""
    folder = pages_of(__package__)
    layout = Template(folder.joinpath(LAYOUT).read_text(encoding="utf-8"))
    return {path: _page(folder, layout, page) for path, page in PAGES.items()} | static_files(__package__)


def _page(folder: Traversable, layout: Template, page: DashboardPage) -> WebFile:
    name = f"{page.name}.html"
    html = layout.substitute(
        title=page.title,
        name=page.name,
        in_run=HERE if page.name == "overview" else "",
        in_credit=HERE if page.name == "credit" else "",
        in_peers=HERE if page.name == "peers" else "",
        main=folder.joinpath(name).read_text(encoding="utf-8"),
    )
    return web_file(name, html.encode())

"""The pages' files: nothing from elsewhere, nothing that a peer says read as HTML, and what they name is there."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from common.web.files import FOLDER, HEADERS, MEDIA_TYPES, STATIC
from coordinator.dashboard.files import LAYOUT, PAGES, web_files

ROOT = Path(__file__).parents[4]
PAGES_FOLDER = ROOT / "coordinator" / "dashboard" / FOLDER
SHARED_FOLDER = ROOT / "common" / "web" / FOLDER
VENDOR = SHARED_FOLDER / "vendor"
PARTS = {path.name for path in PAGES_FOLDER.glob("*.html")}
HTML = {page.name: web_files()[path].content.decode() for path, page in PAGES.items()}
SCRIPTS = {
    path.name: path.read_text(encoding="utf-8")
    for folder in (SHARED_FOLDER, PAGES_FOLDER)
    for path in sorted(folder.glob("*.js"))
}
STYLE = (SHARED_FOLDER / "style.css").read_text(encoding="utf-8")

each_page = pytest.mark.parametrize("page", HTML)
each_script = pytest.mark.parametrize("script", SCRIPTS)


def scripts_of(page: str) -> set[str]:
    """Names of our modules that a page loads, with those that they import."""
    found, new = set(), set(re.findall(r'src="static/(\w+\.js)"', HTML[page]))
    while new:
        found |= new
        new = {name for script in new for name in re.findall(r'from "\./(\w+\.js)"', SCRIPTS[script])} - found
    return found


def test_every_page_is_served_and_every_file_that_is_served_is_in_the_wheel() -> None:
    assert {LAYOUT, *(f"{name}.html" for name in HTML)} == PARTS
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = [f"{package.replace('.', '/')}/{pattern}" for package, found in data.items() for pattern in found]
    served = [path.removeprefix(STATIC) for path in web_files() if path.startswith(STATIC)]
    assert "vendor/uPlot.esm.js" in served
    for path in [*map(_file, served), *(PAGES_FOLDER / part for part in PARTS)]:
        assert any(fnmatch(path.relative_to(ROOT).as_posix(), pattern) for pattern in patterns), path


def _file(name: str) -> Path:
    """Where a file of that name is, among those of the pages or those that all share, and not in both."""
    (found,) = (folder / name for folder in (PAGES_FOLDER, SHARED_FOLDER) if (folder / name).exists())
    return found


def test_what_is_served_has_its_type_and_a_tag_of_its_content() -> None:
    served = web_files()
    assert (PAGES_FOLDER / "overview.html").read_text(encoding="utf-8") in served["/"].content.decode()
    assert served["/"].media_type == MEDIA_TYPES[".html"]
    assert served["/static/style.css"].media_type == MEDIA_TYPES[".css"]
    assert served["/static/vendor/uPlot.esm.js"].media_type == "text/javascript; charset=utf-8"
    assert "/static/vendor/package.json" not in served
    assert len({file.tag for file in served.values()}) == len(served)


@each_page
def test_a_page_has_no_script_or_style_of_its_own_and_asks_for_nothing_from_elsewhere(page: str) -> None:
    html = HTML[page]
    assert not re.search(r"https?:|//[a-z]|@import|<style|javascript:", html)
    assert not re.search(r"\son[a-z]+=|\sstyle=", html)
    assert re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL) == [""]
    for name in re.findall(r'(?:src|href)="static/([^"]+)"', html):
        assert _file(name)


def test_a_style_asks_for_nothing() -> None:
    for style in (STYLE, (VENDOR / "uPlot.min.css").read_text(encoding="utf-8")):
        assert not re.search(r"url\(|@import|https?:", style)


@each_script
def test_nothing_that_comes_from_a_peer_is_read_as_html(script: str) -> None:
    source = SCRIPTS[script]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|DOMParser", source)
    assert not re.search(r"https?:|import\(|WebSocket|XMLHttpRequest", source)


@each_script
def test_every_module_that_is_imported_is_there_with_what_is_taken_of_it(script: str) -> None:
    for names, module in re.findall(r"import \{([^}]+)\} from \"\./([\w/.]+)\"", SCRIPTS[script]):
        for name in filter(None, map(str.strip, names.split(","))):
            exported = rf"export (?:async )?(?:function|const|class) {name}\b"
            assert re.search(exported, SCRIPTS[module]), f"{script} takes {name} of {module}"
    assert all(_file(module) for module in re.findall(r'from "\./([^"]+)"', SCRIPTS[script]))


@each_page
def test_every_part_that_a_script_names_is_in_its_page(page: str) -> None:
    named = {name for script in scripts_of(page) for name in re.findall(r'\bat\("([a-z-]+)"\)', SCRIPTS[script])}
    there = re.findall(r'\bid="([a-z-]+)"', HTML[page])
    assert named <= set(there)
    assert len(there) == len(set(there))
    assert {"state", "key", "key-form", "main"} <= set(there)


def test_the_page_that_is_open_is_marked_where_one_goes_to_others() -> None:
    marked = {name: re.findall(r'href="([^"]+)" aria-current="page"', html) for name, html in HTML.items()}
    assert marked == {"overview": ["./"], "peers": ["peers"], "credit": ["credit"], "peer": [], "layer": []}
    assert not any("$" in html for html in HTML.values())


@each_page
def test_a_page_has_a_language_a_title_landmarks_and_one_first_heading(page: str) -> None:
    html = HTML[page]
    assert '<html lang="en">' in html
    assert re.search(r"<title>[^<]*Kilohive[^<]*</title>", html)
    assert 'name="viewport" content="width=device-width' in html
    assert [len(re.findall(f"<{tag}[ >]", html)) for tag in ("header", "main", "nav", "footer", "h1")] == [1] * 5
    assert '<a class="skip" href="#main">' in html
    assert "status</code> shows the same in a terminal" in html


@each_page
def test_every_field_has_a_label_and_every_table_a_caption(page: str) -> None:
    html = HTML[page]
    for field in re.finditer(r"<(?:input|select|textarea)\b", html):
        before = html[: field.start()]
        assert before.rfind("<label") > before.rfind("</label>")
    assert html.count("<table") == html.count("<caption")


def test_the_browser_is_held_to_files_of_this_server() -> None:
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["img-src"] == "'self'"
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_what_is_taken_from_npm_is_what_was_fetched_and_has_its_licence() -> None:
    lock = json.loads((VENDOR / "package-lock.json").read_text())["packages"]["node_modules/uplot"]
    wanted = json.loads((VENDOR / "package.json").read_text())["dependencies"]["uplot"]
    assert lock["version"] == wanted
    assert lock["integrity"].startswith("sha512-")
    assert f"uPlot (v{wanted})" in (VENDOR / "uPlot.esm.js").read_text(encoding="utf-8")[:400]
    assert "The MIT License" in (VENDOR / "uPlot.LICENSE").read_text(encoding="utf-8")
    lines = (line.split() for line in (VENDOR / "SHA256SUMS").read_text().splitlines())
    assert {name: digest for digest, name in lines} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.glob("uPlot.*")
    }

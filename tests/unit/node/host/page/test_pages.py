"""The files of a host's page: nothing from elsewhere, nothing read as HTML, and all that its scripts name is there."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from common.web.files import FOLDER, MEDIA_TYPES, STATIC
from node.host.owner_limits import CHANGEABLE
from node.host.page.app import page_files

ROOT = Path(__file__).parents[5]
PAGES, SHARED = ROOT / "node" / "host" / "page" / FOLDER, ROOT / "common" / "web" / FOLDER
SERVED = page_files()
HTML = SERVED["/"].content.decode()
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.js"))}

each_script = pytest.mark.parametrize("script", SCRIPTS)


def test_the_page_and_all_that_it_loads_are_served_and_in_the_wheel() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    own = patterns["node.host.page"]
    assert all(any(fnmatch(f"{FOLDER}/{path.name}", pattern) for pattern in own) for path in PAGES.iterdir())
    assert SERVED["/"].media_type == MEDIA_TYPES[".html"]
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', HTML):
        assert f"/{name}" in SERVED
    assert not {path.name for path in PAGES.iterdir()} & {path.name for path in SHARED.iterdir()}


def test_the_page_has_no_script_or_style_of_its_own_and_asks_for_nothing_from_elsewhere() -> None:
    assert not re.search(r"https?:|//[a-z]|@import|<style|javascript:|\son[a-z]+=|\sstyle=", HTML)
    assert re.findall(r"<script[^>]*>(.*?)</script>", HTML, re.DOTALL) == [""]
    assert not re.search(r"url\(|@import|https?:", (PAGES / "controls.css").read_text(encoding="utf-8"))


@each_script
def test_nothing_that_is_told_is_read_as_html(script: str) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", SCRIPTS[script])
    assert not re.search(r"https?:|import\(|WebSocket|XMLHttpRequest", SCRIPTS[script])


@each_script
def test_every_module_that_is_imported_is_served_with_what_is_taken_of_it(script: str) -> None:
    taken = re.findall(r"import \{([^}]+)\} from \"\./([\w/.]+)\"", SCRIPTS[script])
    assert taken
    for names, module in taken:
        source = SERVED[f"{STATIC}{module}"].content.decode()
        for name in filter(None, map(str.strip, names.split(","))):
            assert re.search(rf"export (?:async )?(?:function|const|class) {name}\b", source), f"{name} of {module}"


def test_every_part_that_a_script_names_is_in_the_page_once() -> None:
    there = re.findall(r'\bid="([a-z-]+)"', HTML)
    named = {name for source in SCRIPTS.values() for name in re.findall(r'\bat\("([a-z-]+)"\)', source)}
    assert named <= set(there)
    assert {"state", "main", "sentence"} <= set(there)
    assert len(there) == len(set(there))


def test_there_is_a_field_with_a_note_for_every_limit_that_can_change() -> None:
    fields = re.search(r"const FIELDS = \{(.*?)\n\};", SCRIPTS["controls.js"], re.DOTALL)
    assert fields is not None
    assert re.findall(r"^  (\w+): \{", fields[1], re.MULTILINE) == list(CHANGEABLE)
    for name in CHANGEABLE:
        there = name.replace("_", "-")
        assert f'<input id="{there}"' in HTML
        assert f'aria-describedby="{there}-note"' in HTML
        assert f'<small id="{there}-note">' in HTML


def test_the_page_has_a_language_a_title_landmarks_and_labels() -> None:
    assert '<html lang="en">' in HTML
    assert "<title>Kilohive: this machine</title>" in HTML
    assert 'name="viewport" content="width=device-width' in HTML
    assert [len(re.findall(f"<{tag}[ >]", HTML)) for tag in ("header", "main", "nav", "footer", "h1")] == [1] * 5
    assert '<a class="skip" href="#main">' in HTML
    for found in re.finditer(r"<input\b", HTML):
        before = HTML[: found.start()]
        assert before.rfind("<label") > before.rfind("</label>")
    assert HTML.count("<table") == HTML.count("<caption")

"""The page: in the package, whole, and held to a policy that lets nothing in from elsewhere."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch

from node.api.page import FILE, WebPage
from tests.support.docs import ROOT

HTML = WebPage.read().html


def test_the_wheel_has_the_page() -> None:
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["node.api"]
    assert (ROOT / "node/api" / FILE).exists()
    assert any(fnmatch(FILE, pattern) for pattern in packaged)


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"<script>.*?</script>", "", HTML, flags=re.DOTALL))
    (script,) = re.findall(r"<script>(.*?)</script>", HTML, re.DOTALL)
    assert not re.search(r"https?:|\bimport\b", script)
    assert set(re.findall(r'fetch\("([^"]*)"', script)) == {"health", "v1/models", "v1/completions"}


def test_nothing_that_comes_from_a_model_or_a_peer_is_read_as_html() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", HTML)
    assert not re.search(r"\son[a-z]+=|\sstyle=|javascript:", HTML)


def test_the_policy_names_what_is_in_the_page_and_nothing_else() -> None:
    policy = dict(part.strip().split(" ", 1) for part in WebPage.read().policy.split(";"))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]{44}'", policy["script-src"])
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]{44}'", policy["style-src"])
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"


def test_every_part_that_the_script_names_is_there() -> None:
    named = set(re.findall(r'\bat\("([a-z-]+)"\)', HTML))
    there = set(re.findall(r'\bid="([a-z-]+)"', HTML))
    assert named <= there
    assert {"prompt", "temperature", "max-tokens", "write", "stop", "text", "status"} <= named


def test_every_field_has_a_label_and_the_page_fits_a_phone() -> None:
    for field in re.finditer(r"<(?:input|textarea)\b", HTML):
        before = HTML[: field.start()]
        assert before.rfind("<label") > before.rfind("</label>")
    assert 'name="viewport" content="width=device-width' in HTML
    assert '<html lang="en">' in HTML

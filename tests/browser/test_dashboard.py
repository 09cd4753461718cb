"""The run's page in Chromium: what it shows is what `status` prints, and everybody can read it."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

    from tests.browser.conftest import LivePage

pytestmark = [pytest.mark.timeout(600), pytest.mark.leaks_checked_per_module]

PAGES = ("overview", "peers", "host", "trainer", "layer", "credit")
SCHEMES = ("light", "dark")
WIDTHS = (1280, 390)
KILLED_S = 10.0
SETTLED_MS = 15_000
HALF_A_DIGIT = 0.00051
"""Losses are shown to three digits behind the point."""
each_look = pytest.mark.parametrize(("scheme", "width"), [(scheme, width) for scheme in SCHEMES for width in WIDTHS])


def address(live: LivePage, name: str) -> str:
    """Where a page of each kind is."""
    if name in {"host", "trainer"}:
        return f"{live.url}/peer?id={live.api(f'peers?role={name}')['rows'][0]['peer_id']}"
    return (
        live.url + {"overview": "/", "peers": "/peers?role=all", "layer": "/layer?layer=1", "credit": "/credit"}[name]
    )


@contextmanager
def opened(browser: Browser, url: str, *, scheme: str = "light", width: int = 1280) -> Iterator[Page]:
    """A page that is live, in a window of its own; fails if anything went wrong in it."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, problems = context.new_page(), list[str]()
    page.on("console", lambda message: problems.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url) if "/static/" in request.url else None)
    try:
        page.goto(url)
        page.wait_for_selector('#state[data-is="live"]', timeout=SETTLED_MS)
        yield page
        assert problems == []
    finally:
        context.close()


def settle(page: Page, name: str) -> None:
    """Wait until what comes after the first moment is there: charts, rows."""
    part = {
        "overview": "#held-out canvas",
        "peers": "#peers tbody tr",
        "layer": "#blocks tbody tr",
        "credit": "#hosts tbody tr",
    }
    page.wait_for_selector(part.get(name, "#facts dd"), timeout=SETTLED_MS)
    if name == "overview":
        page.wait_for_selector("#ways pre", timeout=SETTLED_MS)
    page.wait_for_timeout(300)


@pytest.mark.parametrize("name", PAGES)
@each_look
def test_a_page_is_whole_fits_its_window_and_is_for_everybody(
    live: LivePage, browser: Browser, pictures: Path, name: str, scheme: str, width: int
) -> None:
    with opened(browser, address(live, name), scheme=scheme, width=width) as page:
        settle(page, name)
        page.screenshot(path=pictures / f"dashboard-{name}-{scheme}-{width}.png", full_page=True)
        too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert too_wide == 0
        found = Axe().run(page).response["violations"]
        assert [
            (one["id"], one["impact"], one["nodes"][0]["target"]) for one in found if one["impact"] != "minor"
        ] == []


def shown_number(page: Page, selector: str) -> float:
    return float(re.sub(r"[^0-9.]", "", page.inner_text(selector)))


def test_the_numbers_are_those_of_status(live: LivePage, browser: Browser) -> None:
    with opened(browser, address(live, "overview")) as page:
        settle(page, "overview")
        before = live.swarm.status()["figures"]
        page.wait_for_timeout(3000)
        seen = {name: page.inner_text(f"#tile-{name}") for name in ("alive", "peers")}
        moving = {name: shown_number(page, f"#tile-{name} .value") for name in ("run", "loss", "failed")}
        layers = page.locator("#layers tbody tr").all_inner_texts()
        after = live.swarm.status()
    figures = after["figures"]
    assert f"{figures['experts_alive']:,}" in seen["alive"]
    assert f"of {figures['experts']:,}" in seen["alive"]
    assert f"{figures['blocks'] - figures['blocks_lost']} of {figures['blocks']} blocks are live" in seen["alive"]
    assert f"{figures['peers']['host']} hosts, {figures['peers']['trainer']} trainer" in seen["peers"]
    assert before["run_tokens"] <= moving["run"] <= figures["run_tokens"]
    assert before["calls_failed"] <= moving["failed"] <= figures["calls_failed"]
    found = [event["bits_per_byte"] for event in live.trainer.events("eval")]
    assert min(abs(loss - moving["loss"]) for loss in found) < HALF_A_DIGIT
    for row, layer in zip(layers, after["layers"], strict=True):
        assert row.split("\t")[:2] == [f"Layer {layer['layer']}", f"{sum(map(bool, layer['replicas']))} of 16"]
        assert row.split("\t")[6] == str(layer["hosts"])


def test_credit_is_what_the_ledger_has_and_can_be_saved(live: LivePage, browser: Browser) -> None:
    with opened(browser, f"{live.url}/credit") as page:
        settle(page, "credit")
        pairs = page.locator("#hosts tbody tr td:nth-child(5)").all_inner_texts()
        assert [int(text.replace(",", "")) for text in pairs] == [
            row["forward_pairs"] for row in live.api("credit")["rows"]
        ]
        page.select_option("#kind", "trainers")
        expect(page.locator("#trainers tbody tr")).to_have_count(1)
        with page.expect_download() as saved:
            page.click("#csv")
        assert saved.value.suggested_filename == "credit.csv"
        assert saved.value.path().read_text().startswith("role,peer_id,")


def test_the_leaderboard_is_searched_and_leads_to_peers(live: LivePage, browser: Browser) -> None:
    with opened(browser, f"{live.url}/peers") as page:
        settle(page, "peers")
        ids = [row["peer_id"] for row in live.api("peers?role=host")["rows"]]
        assert sorted(page.locator("#peers tbody a").all_inner_texts()) == sorted(f"…{id_[-6:]}" for id_ in ids)
        page.fill("#search", ids[1][-8:])
        expect(page.locator("#peers tbody tr")).to_have_count(1)
        assert ids[1][-8:] in page.url
        page.click("#peers tbody a")
        page.wait_for_selector("#facts dd")
        assert page.inner_text("#id") == ids[1]


def test_everything_can_be_reached_with_the_keyboard(live: LivePage, browser: Browser) -> None:
    with opened(browser, address(live, "overview")) as page:
        settle(page, "overview")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.focus("input[name=span][value=hour]")
        with page.expect_response("**/api/history?span=day"):
            page.keyboard.press("ArrowRight")
        page.focus("#held-out summary")
        page.keyboard.press("Enter")
        expect(page.locator("#held-out tbody tr").nth(2)).to_be_visible()
        page.locator("#ways button").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#ways button:text('Copied')")
        assert page.evaluate("navigator.clipboard.readText()") == live.api("join")["invite"]


def test_a_table_is_filled_in_place_so_that_the_keyboard_stays_where_it_is(live: LivePage, browser: Browser) -> None:
    with opened(browser, f"{live.url}/peers") as page:
        settle(page, "peers")
        page.focus("#peers tbody tr:nth-child(2) a")
        before = page.inner_text("#peers tbody")
        expect(page.locator("#peers tbody")).not_to_have_text(before, timeout=SETTLED_MS, use_inner_text=True)
        assert page.evaluate("document.activeElement.tagName") == "A"


def test_a_page_with_a_key_asks_for_it_and_then_shows_the_run(live: LivePage, browser: Browser) -> None:
    port, key_file = free_port(), live.swarm.folder / "page.key"
    server = live.start("locked", "--key-file", str(key_file), port=port)
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#key", state="visible")
    assert not page.is_visible("#now-title")
    assert page.inner_text("#state") == "locked"
    page.fill("#key", key_file.read_text().strip())
    page.press("#key", "Enter")
    page.wait_for_selector('#state[data-is="live"]', timeout=SETTLED_MS)
    assert page.inner_text("h1") == live.api("overview")["run_id"]
    context.close()
    assert server.stop() == 0


def test_a_page_comes_back_by_itself_when_its_server_does(live: LivePage, browser: Browser) -> None:
    port = free_port()
    server = live.start("passing", port=port)
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector('#state[data-is="live"]', timeout=SETTLED_MS)
    server.kill()
    page.wait_for_selector('#state[data-is="late"]', timeout=SETTLED_MS)
    assert "as of" in page.inner_text("#state")
    live.start("again", port=port)
    page.wait_for_selector('#state[data-is="live"]', timeout=2 * SETTLED_MS)
    context.close()


def test_a_host_that_is_killed_is_seen_within_ten_seconds(live: LivePage, browser: Browser, pictures: Path) -> None:
    peer_id = read_peer_id(live, "host-2")
    with opened(browser, address(live, "overview")) as page:
        settle(page, "overview")
        assert not page.is_visible("#attention")
        started = time.monotonic()
        live.hosts["host-2"].kill()
        page.wait_for_selector(f"#attention-list a:text('…{peer_id[-6:]}')", timeout=1000 * (KILLED_S + 5))
        assert time.monotonic() - started <= KILLED_S
        page.screenshot(path=pictures / "dashboard-attention-light-1280.png")
        expect(page.locator("#tile-peers")).to_contain_text("2 hosts", timeout=2 * SETTLED_MS)


def read_peer_id(live: LivePage, host: str) -> str:
    announced: dict[str, Any] = live.hosts[host].wait_for("announced")
    peer_id: str = announced["peer_id"]
    return peer_id

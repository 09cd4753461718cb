"""A host's page in Chromium: everybody can read and use it, and what its owner sets there is what the host does."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from experiments.live.processes import process_swarm, wait_until
from node.host.owner_limits import LIMITS_FILE
from node.host.page_door import URL_FILE
from tests.browser.conftest import MANIFEST, PATIENCE_S, TRAIN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

    from experiments.live.processes import Node

pytestmark = [pytest.mark.timeout(600), pytest.mark.leaks_checked_per_module]

SETTLED_MS = 20_000
REFUSED = "status of 400"
"""What the browser's console says where a limit is refused."""

LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 390)]


@dataclass(frozen=True, kw_only=True)
class OwnHost:
    """A host that a trainer asks, and the address that its owner opens."""

    node: Node
    url: str


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnHost]:
    """A host with a limit that its command sets, and a page at whichever port is free."""
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("\n\n".join(f"Sentence {n} says that {n} plus {n} is {n + n}." for n in range(3000)))
    with process_swarm(tmp_path_factory.mktemp("own") / "swarm", MANIFEST) as swarm:
        place = ("--join", str(swarm.swarm_file), "--state", str(swarm.folder / "host"))
        host = swarm.start("host", "host", *place, "--max-blocks", "32", "--page-listen", "127.0.0.1:0")
        host.wait_for("announced", PATIENCE_S)
        swarm.trainer("trainer", "--data", str(text), *TRAIN).wait_for("step", PATIENCE_S, count=20)
        yield OwnHost(node=host, url=(host.folder / URL_FILE).read_text().strip())


@contextmanager
def opened(browser: Browser, own: OwnHost, *, scheme: str = "light", width: int = 1280) -> Iterator[Page]:
    """The page, live, in a window of its own; fails if anything went wrong in it."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page, problems = context.new_page(), list[str]()
    page.on("console", lambda message: problems.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    try:
        page.goto(own.url)
        page.wait_for_selector('#state[data-is="live"]', timeout=SETTLED_MS)
        assert "token" not in page.url
        yield page
        assert [problem for problem in problems if REFUSED not in problem] == []
    finally:
        context.close()


def take_picture(page: Page, path: Path) -> None:
    """Without the log, which names folders of the machine on which it is taken."""
    page.evaluate("document.getElementById('log').closest('section').hidden = true")
    page.screenshot(path=path, full_page=True)
    page.evaluate("document.getElementById('log').closest('section').hidden = false")


def faults_of(page: Page) -> list[tuple[str, object]]:
    """What does not fit its window, or keeps somebody out."""
    too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    found = Axe().run(page).response["violations"]
    violations = [(one["id"], one["nodes"][0]["target"]) for one in found if one["impact"] != "minor"]
    return [*violations, *([("pixels beyond the window", too_wide)] if too_wide else [])]


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_the_page_is_whole_fits_its_window_and_is_for_everybody(
    own: OwnHost, browser: Browser, pictures: Path, scheme: str, width: int
) -> None:
    with opened(browser, own, scheme=scheme, width=width) as page:
        page.wait_for_selector("#bandwidth canvas", timeout=SETTLED_MS)
        page.wait_for_timeout(12_000)  # for lines in the charts
        expect(page.locator("#sentence")).to_contain_text("This machine serves 128 experts in 32 blocks")
        expect(page.locator("#blocks tbody tr")).to_have_count(32)
        take_picture(page, pictures / f"host-page-{scheme}-{width}.png")
        assert faults_of(page) == []


def test_a_limit_is_set_and_refused_with_the_keyboard(own: OwnHost, browser: Browser) -> None:
    with opened(browser, own) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        expect(page.locator("#on-battery")).to_be_disabled()
        expect(page.locator("#on-battery-note")).to_contain_text("Set by the host's command")
        expect(page.locator("#apply")).to_be_disabled()
        page.focus("#max-bandwidth-up")
        page.keyboard.type("3")
        page.keyboard.press("Enter")
        expect(page.locator("#limits-said")).to_have_text("The limit holds now.", timeout=SETTLED_MS)
        expect(page.locator("#tile-up")).to_contain_text("at most 3.0 MB/s", timeout=SETTLED_MS)
        expect(page.locator("#apply")).to_be_disabled()
        assert json.loads((own.node.folder / LIMITS_FILE).read_text()) == {"max_bandwidth_up": "3MB/s"}
        page.fill("#schedule", "late")
        page.press("#schedule", "Enter")
        expect(page.locator("#limits-said.bad")).to_contain_text("--schedule", timeout=SETTLED_MS)
        page.wait_for_timeout(3000)
        assert page.input_value("#schedule") == "late", "what its owner writes is not written over"


def test_a_pause_is_seen_at_the_top_and_ended(own: OwnHost, browser: Browser, pictures: Path) -> None:
    with opened(browser, own) as page:
        page.click("#pause-hour")
        expect(page.locator("#sentence")).to_contain_text("This machine is paused until ", timeout=SETTLED_MS)
        expect(page.locator("#attention-list")).to_contain_text("its owner paused it")
        expect(page.locator("#pause-hour")).to_be_hidden()
        take_picture(page, pictures / "host-page-paused-light-1280.png")
        assert faults_of(page) == []
        page.click("#resume")
        expect(page.locator("#sentence")).to_contain_text("This machine serves 128 experts", timeout=SETTLED_MS)
        expect(page.locator("#attention")).to_be_hidden()


def test_a_browser_without_the_token_sees_nothing(own: OwnHost, browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(own.url.partition("/enter")[0])
    assert page.inner_text("body").startswith("This page is for this machine's owner")
    context.close()


def test_a_host_that_leaves_is_said_so_and_ends(own: OwnHost, browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(own.url)
    page.wait_for_selector('#state[data-is="live"]', timeout=SETTLED_MS)
    page.click("summary:text('Leave the run')")
    page.click("#leave")
    expect(page.locator("#sentence")).to_contain_text("hands its blocks over", timeout=SETTLED_MS)
    wait_until(own.node.child.ended, "it has left", PATIENCE_S)
    assert own.node.stop() == 0
    context.close()

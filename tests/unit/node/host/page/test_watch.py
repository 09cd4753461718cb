"""What open pages are told of a host that answers, of one that does not, and of credit that cannot be read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import StorageError, UnavailableError
from common.web.feed import Feed
from node.host.page import watch as module
from node.host.page.credit import CreditReader
from node.host.page.watch import CREDIT_S, HostWatch
from tests.support.told_host import CREDIT, told

if TYPE_CHECKING:
    from pathlib import Path


class Scene:
    """A watch over a host that says what the test says, or raises it, at a time that the test moves."""

    def __init__(self, folder: Path) -> None:
        self.now_s, self.asked, self.read = 50.0, 0, 0
        self.says: dict[str, Any] | Exception = told(run_id="run-1")
        self.credit: Any = CREDIT
        self.feed = Feed(4)
        self.watch = HostWatch(folder, self.feed, "word", lambda: self.now_s)

    async def ask(self, _folder: Path, _what: str) -> dict[str, Any]:
        self.asked += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    def read_credit(self, _now_s: float) -> Any:
        self.read += 1
        if isinstance(self.credit, Exception):
            raise self.credit
        return self.credit

    async def shown(self, after_s: float = 0.0) -> dict[str, Any]:
        """What a page that is open is told then."""
        self.now_s += after_s
        with self.feed.joined() as client:
            await self.watch.look()
            found: dict[str, Any] = json.loads(await client.news(1.0) or b"null")
            return found


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    made = Scene(tmp_path)
    monkeypatch.setattr(module, "ask", made.ask)
    monkeypatch.setattr(CreditReader, "read", made.read_credit)
    return made


async def test_a_host_is_asked_only_while_somebody_looks(scene: Scene) -> None:
    scene.now_s += 100
    await scene.watch.look()
    assert (scene.asked, scene.watch.looked_at_s) == (0, 50.0)
    assert (await scene.shown())["sentence"].startswith("This machine serves 64 experts")
    assert (scene.asked, scene.watch.looked_at_s) == (1, 150.0)


async def test_who_comes_later_is_not_shown_what_was_true_before(scene: Scene) -> None:
    await scene.shown()
    await scene.watch.look()
    scene.says = told(run_id="run-1", work={"tokens_per_s": 7.0})
    assert (await scene.shown())["work"]["tokens_per_s"] == 7.0


async def test_a_host_that_does_not_answer_is_said_so_and_shown_again_when_it_does(scene: Scene) -> None:
    answers, scene.says = scene.says, UnavailableError("state: no host runs from this folder")
    assert (await scene.shown())["problem"] == "state: no host runs from this folder"
    scene.says = answers
    assert (await scene.shown())["problem"] == ""


async def test_a_host_of_another_version_is_said_so(scene: Scene) -> None:
    for says in ({}, {"now_s": "x", "use": None}, told()):
        scene.says = says
        assert "its host is of another version" in (await scene.shown())["problem"]


async def test_credit_is_read_seldom_and_at_once_for_another_run(scene: Scene) -> None:
    for _ in range(2):
        assert (await scene.shown())["credit"]["confirmed"] == 6
    assert scene.read == 1
    await scene.shown(after_s=CREDIT_S)
    assert scene.read == 2
    scene.says = told(run_id="run-2")
    await scene.shown()
    assert scene.read == 3


async def test_credit_that_cannot_be_read_is_left_out_and_logged_once(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.credit = StorageError("credit/run-1.sqlite: disk I/O error")
    for _ in range(2):
        assert (await scene.shown(after_s=CREDIT_S))["credit"] is None
    assert caplog.messages == ["Credit is not shown now: credit/run-1.sqlite: disk I/O error"]

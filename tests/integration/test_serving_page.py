"""The page's own script against a real server, in node, where there is one; a browser is not needed."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import Any

import pytest

from tests.support.docs import ROOT
from tests.support.serving import NAME, PATIENCE_S, Serving, serving, small_model

NODE = shutil.which("node")
KEY = "sk-0123456789abcdef"
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


async def seen(server: Serving, action: str = "write", key: str = "") -> dict[str, Any]:
    """What the page shows once it has done `action`."""
    program, page = ROOT / "tests/support/page_in_node.mjs", ROOT / "node/api/page.html"
    process = await asyncio.create_subprocess_exec(
        str(NODE), str(program), str(page), f"{server.url}/", key, action, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        output, _ = await process.communicate()
    found: dict[str, Any] = json.loads(output)
    return found


async def test_the_page_streams_a_text_and_tells_who_answered_for_each_token() -> None:
    async with serving() as server:
        found = await seen(server)
        client = server.openai()
        answer = await client.completions.create(model=NAME, prompt="<b>The ", temperature=0, max_tokens=12)
    assert found["text"] == f"<b>The {answer.choices[0].text}"
    assert (found["nTokens"], found["isBad"]) == (12, False)
    assert found["status"] == "That was the last token asked for."
    assert (found["model"], found["health"]) == (NAME, "all 32 experts have a host")
    assert found["last"].endswith(", number 12: 8 answers of 2 peers")
    assert found["beforeLast"].endswith(", number 11: 8 answers of 2 peers")
    assert found["peers"] == [["peer-a", "5"], ["peer-b", "3"]]
    assert found["total"] == [["peer-a", "60"], ["peer-b", "36"]]


@pytest.mark.parametrize("action", ["stop", "escape"])
async def test_a_stop_on_the_page_frees_the_server(action: str) -> None:
    async with serving(max_tokens=10**6) as server:
        found = await seen(server, action)
        await server.until("kilohive_texts_running", 0)
    assert (found["status"], found["isBad"]) == ("Stopped.", False)
    assert 3 <= found["nTokens"] < 100_000


async def test_the_page_asks_for_the_key_where_there_is_one() -> None:
    async with serving(key=KEY) as server:
        found = await seen(server, key=KEY)
    assert found["atFirst"]["asksForKey"]
    assert "send the key of this server" in found["atFirst"]["status"]
    assert found["nTokens"] == 12


async def test_the_page_shows_an_error_in_mid_text_and_what_was_written() -> None:
    small = small_model()
    small.counted.failing, small.here.waits = set(range(11, 100_000)), lambda: False
    async with serving(small) as server:
        found = await seen(server)
    assert found["isBad"]
    assert "none of its 16 experts has a live replica" in found["status"]
    assert found["nTokens"] == 5

"""Open pages: a bounded number of them, each with the newest message and no queue of old ones."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import OverloadedError
from common.web.feed import Feed

SOON_S = 20.0


async def test_a_message_that_is_old_is_given_to_no_page_that_is_opened_later() -> None:
    feed = Feed(2)
    feed.publish(b"old")
    feed.forget()
    with feed.joined() as client:
        feed.publish(b"new")
        assert await client.news(SOON_S) == b"new"


async def test_a_page_gets_the_latest_message_at_once_and_then_each_new_one() -> None:
    feed = Feed(2)
    feed.publish(b"1")
    with feed.joined() as client:
        assert await client.news(SOON_S) == b"1"
        waiting = asyncio.create_task(client.news(SOON_S))
        await asyncio.sleep(0)
        feed.publish(b"2")
        assert await waiting == b"2"


async def test_a_page_that_is_slow_gets_the_newest_message_alone() -> None:
    feed = Feed(2)
    with feed.joined() as slow:
        for number in range(1000):
            feed.publish(str(number).encode())
        assert await slow.news(SOON_S) == b"999"
        assert await slow.news(0.001) is None


async def test_without_news_a_page_is_told_so() -> None:
    with Feed(1).joined() as client:
        assert await client.news(0.001) is None
        assert not client.has_ended


async def test_pages_are_bounded_and_make_room_when_they_are_closed() -> None:
    feed = Feed(2)
    with feed.joined():
        with feed.joined(), pytest.raises(OverloadedError, match="2 pages are kept up to date already") as caught:
            feed.joined().__enter__()
        assert caught.value.retry_after_s > 1
        assert feed.n_clients == 1
        with feed.joined():
            assert feed.n_clients == 2
    assert feed.n_clients == 0


async def test_pages_end_with_the_server() -> None:
    feed = Feed(1)
    with feed.joined() as client:
        waiting = asyncio.create_task(client.news(SOON_S))
        await asyncio.sleep(0)
        feed.end()
        assert await waiting is None
        assert client.has_ended

"""Parts of a model from live replicas: how long they are waited for, and what is said when one is not to be had."""

from __future__ import annotations

import asyncio
import random
import re

import pytest

from common.errors import UnavailableError
from node.averaging.joining import JoinConfig, fetch_with_word
from node.averaging.live_replicas import words_of
from node.averaging.pieces import PARAMS
from node.trainer.exported.layout import parts_of
from protocol.manifest import TRUNK, BlockId, all_blocks
from tests.support.live_replicas import MANIFEST, MODEL, downloads, live, replicas_of_everything

BLOCK = BlockId(0, 0)
WANTED = [t._replace(name=f"{PARAMS}{t.name.rpartition('.')[2]}") for t in parts_of(MANIFEST)[1].tensors]
A_TRAINER = "start a trainer of this run, or name with --trunk the folder of one that has ended"
HOSTS = "start hosts for this run, look at it with `status`, and try again"
EXPERTS = "experts 4 to 11 of layer 0, experts 0 to 3 of layer 1"


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.averaging.live_replicas.WAIT_FOR_CHANGE_S", 0.01)


async def test_a_download_that_broke_off_begins_anew_so_that_all_of_it_is_of_one_moment() -> None:
    client, _ = downloads()
    client.failing = {"a": 1, "b": 1}
    replicas = replicas_of_everything("a", "b").replicas(BLOCK)
    config = JoinConfig(max_distance=0.5, weights_only=True)
    with pytest.raises(UnavailableError):
        await fetch_with_word(client, replicas, WANTED, config, random.Random(0))
    fetched = await fetch_with_word(client, replicas, WANTED, config, random.Random(0))
    assert fetched.is_corroborated
    assert [taken for _, _, taken in client.asked] == [0, 0, 0, 0]


async def test_a_replica_that_fails_is_asked_again_while_there_is_time() -> None:
    client, _ = downloads()
    client.failing = {"a": 1}
    fetched = await live(replicas_of_everything("a"), client, wait_s=30).fetch(BLOCK, WANTED)
    assert (fetched.peer_id, fetched.is_corroborated) == ("a", False)
    client.failing = {"a": 10**6}
    with pytest.raises(UnavailableError, match="block 0/0: none of 1 replicas could be downloaded"):
        await live(replicas_of_everything("a"), client).fetch(BLOCK, WANTED)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (
            [TRUNK, BlockId(0, 1), BlockId(0, 2), BlockId(1, 0)],
            f"the trunk, {EXPERTS} have no live replica after a wait of 0 s: {A_TRAINER}; {HOSTS}",
        ),
        (
            [BlockId(0, 1), BlockId(0, 2), BlockId(1, 0)],
            f"{EXPERTS} have no live replica after a wait of 0 s: {HOSTS}",
        ),
        ([TRUNK], f"no live trainer has the trunk after a wait of 0 s: {A_TRAINER}"),
    ],
    ids=["both", "experts", "trunk"],
)
async def test_what_has_no_replica_is_waited_for_and_named_with_what_to_do(gone: list[BlockId], words: str) -> None:
    client, _ = downloads()
    directory = replicas_of_everything("a")
    for block_id in gone:
        del directory.table[block_id]
    ids = [TRUNK, *all_blocks(MODEL)]
    with pytest.raises(UnavailableError, match=f"^{re.escape(words)}$"):
        await live(directory, client).wait_for(ids)
    waiting = asyncio.create_task(live(directory, client, wait_s=30).wait_for(ids))
    await asyncio.sleep(0)
    directory.add("b", "127.0.0.1:2", ids)
    await waiting


def test_many_places_are_counted() -> None:
    blocks = [BlockId(layer, 0) for layer in range(9)]
    assert words_of(blocks, MODEL).endswith("experts 0 to 3 of layer 4, 4 more places")

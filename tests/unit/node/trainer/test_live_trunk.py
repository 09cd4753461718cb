"""The trunk of a run that goes on training: from whom it is taken, and what is said of that."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from node.export.source import seeded_trunk
from node.trainer.exported.layout import trunk_tensors
from node.trainer.live_trunk import take_trunk
from tests.support.live_replicas import MANIFEST, downloads, live, replicas_of_everything

WHERE = "at 4,096 tokens of the run, version 9"


@pytest.mark.parametrize(
    ("trainers", "told"),
    [
        (("a",), f"The trunk is that of trainer a {WHERE}; nobody else could confirm it"),
        (("a", "b"), f"The trunk is that of trainer [ab] {WHERE}; a second trainer confirms it"),
    ],
    ids=["one trainer", "two"],
)
async def test_one_line_says_whose_trunk_it_is_and_how_far_it_was_trained(
    trainers: tuple[str, ...], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, trunk = downloads()
    model = seeded_trunk(MANIFEST)
    with caplog.at_level(logging.INFO, "node.trainer.live_trunk"):
        taken = await take_trunk(model, live(replicas_of_everything(*trainers), client))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "node.trainer.live_trunk"]
    assert taken.is_corroborated is (len(trainers) == 2)
    torch.testing.assert_close(trunk_tensors(model), trunk)
    assert re.fullmatch(told, line)

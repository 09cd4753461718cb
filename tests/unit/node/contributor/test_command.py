"""Mistakes in what is offered: told in one sentence, before anybody is called."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import ConfigError
from node.contributor import command
from node.contributor.command import run_contribute
from node.contributor.config import ContributeConfig
from node.model.expert_file import ExpertId, expert_file
from tests.support.offers import weights
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = small_manifest(dtype="fp64", codec="fp64")
PLACE = ExpertId(1, 7)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, r"expert\.safetensors: is not there; --fetch writes the present expert"),
        ({"fetch": True, "train": 3}, "--fetch, --train: give one of them"),
        ({"device": "gpu"}, "--device: 'gpu' is not a device"),
        ({"layer": -1}, r"--layer: must be 0 or more, is -1"),
    ],
    ids=["no file", "fetch and train", "device", "layer"],
)
async def test_a_mistake_is_told_before_the_swarm_is_looked_for(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    config = ContributeConfig(file=tmp_path / "expert.safetensors", join=str(tmp_path / "no-swarm.toml"))
    with pytest.raises(ConfigError, match=problem):
        await run_contribute(replace(config, **changes), asyncio.Event())


async def test_a_file_that_is_too_long_is_told_before_the_swarm_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ContributeConfig(file=tmp_path / "expert.safetensors", join=str(tmp_path / "no-swarm.toml"))
    config.file.write_bytes(bytes(11))
    monkeypatch.setattr(command, "MAX_FILE_BYTES", 10)
    with pytest.raises(ConfigError, match="is longer than 10 bytes"):
        await run_contribute(config, asyncio.Event())


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (expert_file({"w_in": torch.zeros(2)}, {}), "e.safetensors: file: holds other tensors than w_in, w_out"),
        (b"{}", r"e.safetensors: file\.header"),
        (
            expert_file(weights(), {"layer": "0", "expert": "7"}),
            "e.safetensors: says that it is expert 7 of layer 0, offered was expert 7 of layer 1",
        ),
    ],
    ids=["tensors", "no safetensors", "another expert"],
)
def test_what_every_evaluator_would_refuse_is_not_sent(tmp_path: Path, data: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        command._check_file(tmp_path / "e.safetensors", data, PLACE, MANIFEST)
    command._check_file(tmp_path, expert_file(weights(), {"layer": "1", "expert": "7"}), PLACE, MANIFEST)
    command._check_file(tmp_path, expert_file(weights(), {}), PLACE, MANIFEST)


def test_a_place_that_the_run_does_not_have_is_told_by_its_flags() -> None:
    with pytest.raises(ConfigError, match="--layer, --expert: are 2, 0; the run has 2 layers of 16 experts"):
        command._check_place(ExpertId(2, 0), MANIFEST)

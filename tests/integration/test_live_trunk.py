"""A run that goes on training is evaluated, sampled and served without a folder of its trainer's."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UnavailableError
from node.api.chat import Turn
from node.api.config import ServeConfig
from node.api.serve_command import served_model
from node.export.command import run_export
from node.export.config import ExportConfig
from node.model.pretrained_files import language_model
from node.trainer.config import EvaluateConfig, SampleConfig
from node.trainer.evaluation import run_evaluate
from node.trainer.sample_command import run_sample
from tests.support.contributing import run_in_loop
from tests.support.exported import HASH
from tests.support.exported_runs import RATES, trained_run
from tests.support.swarm_parts import small_manifest
from tests.support.tiny_pretrained import END, kept_manifest, save_chat_model

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.contributing import RunInLoop

MANIFEST = small_manifest(codec="fp32", model={**HASH, "gate_heads": 2}, optimizer=RATES)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    language_model.cache_clear()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Row {n}: the square of {n % 50} is {(n % 50) ** 2}." for n in range(3000)))
    return path


async def standing_still(run: RunInLoop) -> dict[str, torch.Tensor]:
    """The trunk that the trainer has saved, once the rate is 0, although it goes on."""
    saved = run.trainer_folder / "trunk.safetensors"
    await run.until(lambda: saved.exists() and int(load_file(saved)["optimizer.step.head_VD"]) > 100)
    return {name.removeprefix("model."): t for name, t in load_file(saved).items() if name.startswith("model.")}


async def test_without_a_folder_the_trunk_is_that_of_a_live_trainer(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    stop = asyncio.Event()
    async with run_in_loop(tmp_path, MANIFEST, text, n_hosts=1, steps=10**6) as run:
        saved = await standing_still(run)
        capsys.readouterr()
        with caplog.at_level(logging.INFO, "node.trainer.live_trunk"):
            async with served_model(ServeConfig(swarm=run.swarm_file), stop) as served:
                parameters = dict(served.model.named_parameters())
        assert "The trunk is that of trainer " in caplog.text
        assert " tokens of the run, version " in caplog.text
        assert len(parameters) > 10
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), saved[name], atol=1e-6, rtol=0)
        await run_sample(SampleConfig(swarm=run.swarm_file, prompt="Row 7:", n_tokens=8), stop)
        assert "Row 7:" in capsys.readouterr().out
        evaluate = EvaluateConfig(swarm=run.swarm_file, data=text, n_bytes=4096)
        for folder in (None, run.trainer_folder):
            await run_evaluate(replace(evaluate, out=folder), stop)
    told = [line.split(" at ") for line in capsys.readouterr().out.splitlines() if "held-out bits per byte (" in line]
    (live_bits, live_age), (bits, age) = told
    assert live_bits == bits
    assert live_age.startswith("version ")
    assert age.startswith("step ")


@pytest.mark.slow  # a swarm and an export of it, for what tests/unit/node/api/test_chat.py compares without them
async def test_a_run_around_a_pretrained_model_and_its_export_render_the_same_prompt(
    tmp_path: Path, text: Path
) -> None:
    manifest, stop, out = kept_manifest(save_chat_model(tmp_path / "pretrained")), asyncio.Event(), tmp_path / "model"
    turns = [Turn(role="system", content="Be brief."), Turn(role="user", content="Hello")]
    chats = []
    async with run_in_loop(tmp_path, manifest, text, n_hosts=1, steps=10**6) as run:
        await run_export(ExportConfig(swarm=run.swarm_file, out=out), stop)
        for config in (ServeConfig(swarm=run.swarm_file), ServeConfig(export=out)):
            async with served_model(config, stop) as served:
                chats.append((served.chat.text(turns), served.chat.stop))
    assert chats == [(f"<system>Be brief.{END}<user>Hello{END}<assistant>", (END,))] * 2


async def test_a_run_without_a_trainer_is_told_in_one_sentence(tmp_path: Path, text: Path) -> None:
    async with trained_run(tmp_path, MANIFEST, text, n_hosts=1) as run:
        config = SampleConfig(swarm=run.swarm_file, join_timeout_s=2.0)
        words = "no live trainer has the trunk after a wait of 2 s: .* or name with --out the folder of one that has"
        with pytest.raises(UnavailableError, match=words):
            await run_sample(config, asyncio.Event())

"""A model around a pretrained one leaves its swarm: exported, and read again without the swarm and without Kilohive."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import CheckpointError, DataError
from common.text import printable
from experiments.live.processes import RUN_NODE
from kilohive import load_model
from node.export.command import run_export
from node.export.config import ExportConfig
from node.export.unfinished import UnfinishedExport
from node.model.pretrained_files import language_model
from node.trainer.config import EvaluateConfig, SampleConfig
from node.trainer.evaluation import run_evaluate
from node.trainer.sample_command import run_sample
from node.trainer.trained_model import trained_model
from protocol.manifest import OptimizerConfig
from tests.support.contributing import run_in_loop
from tests.support.exported import contents, flipped
from tests.support.exported_runs import CLOSE, RATES, greedy, killed_export, read_by_a_stranger, trained_run
from tests.support.tiny_pretrained import END, N_TOKENS, kept_manifest, save_chat_model
from tests.support.tiny_tokenizer import SENTENCES

if TYPE_CHECKING:
    from pathlib import Path

    from node.export.unfinished import Taken
    from node.trainer.exported.layout import ModelPart
    from protocol.manifest import Manifest
    from tests.support.contributing import RunInLoop

CODES: dict[str, Any] = {"gate_reads": "tokens", "gate_heads": 2}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frozen": ({}, {}),
    "unfrozen and by codes": (
        {"tie_word_embeddings": True},
        {**CODES, "unfreeze": ("model.norm", "model.embed_tokens")},
    ),
    "bf16": ({"dtype": torch.bfloat16}, {"dtype": "bf16"}),
}
PROMPT = "the swarm"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    language_model.cache_clear()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{sentence}number {n}\n\n" for n in range(400) for sentence in SENTENCES))
    return path


def manifest_around(folder: Path, model: dict[str, Any] | None = None, **run: Any) -> Manifest:
    """A run around a chat model in `folder`, that stands still when it has trained."""
    manifest = kept_manifest(save_chat_model(folder, **(model or {})), **run)
    rates: dict[str, Any] = {**RATES, "warmup_tokens": 0}
    return replace(manifest, optimizer=OptimizerConfig(**rates))


@pytest.mark.parametrize(("model", "run"), KINDS.values(), ids=KINDS)
async def test_swarm_process_and_stranger_have_one_model(
    tmp_path: Path, text: Path, model: dict[str, Any], run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, stop, out = manifest_around(tmp_path / "pretrained", model, **run), asyncio.Event(), tmp_path / "model"
    ids = torch.randint(0, N_TOKENS, (3, 16), generator=torch.Generator().manual_seed(1))
    async with trained_run(tmp_path, manifest, text, n_hosts=1) as live_run:
        await run_export(ExportConfig(swarm=live_run.swarm_file, out=out, trunk=live_run.trainer_folder), stop)
        assert "the pretrained model, the trunk and 32 experts of run pretrained-" in capsys.readouterr().out
        in_swarm = EvaluateConfig(swarm=live_run.swarm_file, out=live_run.trainer_folder)
        async with trained_model(in_swarm, stop) as trained:
            prompt = trained.tokenizer.encode([PROMPT.encode()])[0].tolist()
            live = await asyncio.to_thread(greedy, trained.model, ids, prompt)
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "pretrained")
    (tmp_path / "alone").mkdir()
    logits_BTV, told = await read_by_a_stranger(out, tmp_path / "alone", ids, PROMPT)
    here = greedy(load_model(out), ids, prompt)
    close = CLOSE if manifest.pretrained.dtype == "fp32" else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(here.logits_BTV, live.logits_BTV, **close)
    torch.testing.assert_close(logits_BTV.float(), live.logits_BTV, **close)
    assert here.written == live.written
    assert told["read"] == [prompt]
    assert told["chat"] == f"<user>Hello{END}<assistant>"
    assert set(told["types"].values()) == (
        {"float32"} if manifest.pretrained.dtype == "fp32" else {"float32", "bfloat16"}
    )
    capsys.readouterr()
    await run_sample(SampleConfig(export=out, prompt=PROMPT, n_tokens=8, temperature=0), stop)
    assert capsys.readouterr().out == f"{printable(told['text'])}\n"
    await run_evaluate(EvaluateConfig(export=out, data=text, n_bytes=4 * 16_384), stop)
    summary = json.loads((tmp_path / "trainer" / "summary.json").read_text())
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(summary["bits_per_byte_end"], abs=1e-3)
    assert summary["bits_per_byte_end"] < summary["bits_per_byte_start"] - 0.1
    card = (out / "README.md").read_text()
    assert all(file.sha256 in card for file in manifest.pretrained.files)
    for name in ("model-00001-of-00001.safetensors", "kilohive_gates.py"):
        with flipped(out / name), pytest.raises(CheckpointError, match=f"{name}: is damaged"):
            load_model(out)


@pytest.mark.slow  # the same of other runs in tests/integration/test_export.py
async def test_an_export_that_is_stopped_or_killed_goes_on_to_the_same_folder_and_names_a_file_that_is_gone(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.trainer.exported.layout.PIECE_BYTES", 20_000)
    manifest = manifest_around(tmp_path / "pretrained")
    async with trained_run(tmp_path, manifest, text, n_hosts=1) as run:
        config = ExportConfig(swarm=run.swarm_file, out=tmp_path / "whole", trunk=run.trainer_folder)
        await run_export(config, asyncio.Event())
        wanted = contents(tmp_path / "whole")
        for n_kept in (2, 10, 12):
            config = replace(config, out=tmp_path / f"stopped-{n_kept}")
            await stopped_export(config, n_kept, monkeypatch)
            assert not config.out.exists()
            (tmp_path / "cache").rename(tmp_path / "elsewhere")
            kept = contents(config.out.with_name(f"{config.out.name}.partial") / "parts")
            with pytest.raises(DataError, match=r"no trainer sends the file .* from a trainer that has it"):
                await run_export(replace(config, join_timeout_s=2.0), asyncio.Event())
            assert contents(config.out.with_name(f"{config.out.name}.partial") / "parts") == kept
            shutil.rmtree(tmp_path / "cache")
            (tmp_path / "elsewhere").rename(tmp_path / "cache")
            await run_export(config, asyncio.Event())
            assert contents(config.out) == wanted
        out = tmp_path / "killed"
        await killed_export(run, out)
        assert not out.exists()
        monkeypatch.undo()
        monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
        await run_export(replace(config, out=out), asyncio.Event())
        assert contents(out) == wanted


async def stopped_export(config: ExportConfig, n_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped when so many parts have come."""
    stop, loop, keep = asyncio.Event(), asyncio.get_running_loop(), UnfinishedExport.keep
    kept: list[ModelPart] = []

    def stopping(self: UnfinishedExport, part: ModelPart, tensors: dict[str, torch.Tensor], taken: Taken) -> None:
        keep(self, part, tensors, taken)
        kept.append(part)
        if len(kept) == n_kept:
            loop.call_soon_threadsafe(stop.set)

    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedExport, "keep", stopping)
        await run_export(config, stop)


async def test_an_exporter_gets_the_pretrained_files_from_a_trainer(tmp_path: Path, text: Path) -> None:
    manifest = manifest_around(tmp_path / "pretrained")
    async with run_in_loop(tmp_path, manifest, text, n_hosts=1, steps=10**6) as run:
        await run.until((run.trainer_folder / "trunk.safetensors").exists)
        told = await strangers_export(run, tmp_path / "stranger")
    assert "Asking the run's trainers for the file" in told
    folder = tmp_path / "stranger" / "model"
    load_model(folder)
    assert "The trunk was taken from the only replica that could be had" in (folder / "README.md").read_text()


async def strangers_export(run: RunInLoop, folder: Path) -> str:
    """What an export says, on standard error, of a machine that has nothing of the run."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, RUN_NODE, "export", "--join", str(run.swarm_file), "--out", str(folder / "model")),
        env={**os.environ, "KILOHIVE_CACHE": str(folder / "cache")},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, errors.decode()
    return errors.decode()

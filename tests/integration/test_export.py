"""A model leaves its swarm: a real run is trained, exported, and read again without the swarm and without Kilohive."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from common.assets import asset_of
from common.errors import ConfigError, UnavailableError
from kilohive import load_model
from node.export.command import run_export
from node.export.config import ExportConfig
from node.export.unfinished import UnfinishedExport
from node.trainer.config import EvaluateConfig, SampleConfig
from node.trainer.evaluation import run_evaluate
from node.trainer.sample_command import run_sample
from node.trainer.trained_model import trained_model
from protocol.run_assets import DataConfig
from tests.support.contributing import run_in_loop
from tests.support.exported import HASH, contents
from tests.support.exported_runs import CLOSE, RATES, greedy, killed_export, read_by_a_stranger, trained_run
from tests.support.swarm_parts import small_manifest
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from node.export.unfinished import Taken
    from node.trainer.exported.layout import ModelPart
    from protocol.manifest import Manifest

ASSET = asset_of(tiny_tokenizer())
PAIRS = DataConfig(tokenizer=ASSET.sha256, tokenizer_bytes=ASSET.n_bytes)
BYTE_RUN = small_manifest(codec="fp32", model={**HASH, "gate_heads": 2}, optimizer=RATES)
PAIR_RUN = small_manifest(codec="fp32", model={"gate": "topk", "vocab_size": 300}, data=PAIRS, optimizer=RATES)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Row {n}: the square of {n % 50} is {(n % 50) ** 2}." for n in range(3000)))
    return path


@pytest.mark.parametrize("manifest", [BYTE_RUN, PAIR_RUN], ids=["bytes", "pairs"])
async def test_swarm_process_and_stranger_have_one_model(
    tmp_path: Path, text: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompt, stop = tmp_path / "model", "Row 7:", asyncio.Event()
    for name in ("first", "alone"):
        tmp_path.joinpath(name).mkdir()
    ids = torch.randint(0, manifest.model.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    async with trained_run(tmp_path, manifest, text, n_hosts=1) as run:
        config = ExportConfig(swarm=run.swarm_file, out=out, trunk=run.trainer_folder, shard_mb=1)
        await run_export(config, stop)
        assert "the trunk and 32 experts of run test-" in capsys.readouterr().out
        _, told = await read_by_a_stranger(out, tmp_path / "first", ids, prompt)
        (read,) = told["read"]
        in_swarm = EvaluateConfig(swarm=run.swarm_file, out=run.trainer_folder)
        async with trained_model(in_swarm, stop) as trained:
            live = await asyncio.to_thread(greedy, trained.model, ids, read)
        with pytest.raises(ConfigError, match=r"--out: .*model is not empty"):
            await run_export(config, stop)
    logits_BTV, told = await read_by_a_stranger(out, tmp_path / "alone", ids, prompt)
    here = greedy(load_model(out), ids, read)
    torch.testing.assert_close(here.logits_BTV, live.logits_BTV, **CLOSE)
    torch.testing.assert_close(logits_BTV, live.logits_BTV, **CLOSE)
    assert here.written == live.written
    capsys.readouterr()
    await run_sample(SampleConfig(export=out, prompt=prompt, n_tokens=8, temperature=0), stop)
    assert capsys.readouterr().out == f"{told['text']}\n".translate({0: "·"})
    await run_evaluate(EvaluateConfig(export=out, data=text, n_bytes=4 * 16_384), stop)
    summary = json.loads((tmp_path / "trainer" / "summary.json").read_text())
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(summary["bits_per_byte_end"], abs=1e-3)
    card = (out / "README.md").read_text()
    assert f"{summary['bits_per_byte_end']:.4f} bits per byte" in card
    assert f"| data | {text.name} |" in card
    assert "nobody confirms them" in card


async def test_the_trunk_comes_from_a_live_trainer_and_blocks_from_two_replicas(tmp_path: Path, text: Path) -> None:
    manifest = replace(BYTE_RUN, averaging=replace(BYTE_RUN.averaging, target_replicas=2, period_s=0.2))
    async with run_in_loop(tmp_path, manifest, text, n_hosts=2, steps=10**6) as run:
        saved = run.trainer_folder / "trunk.safetensors"
        await run.until(lambda: saved.exists() and int(load_file(saved)["optimizer.step.head_VD"]) > 100)
        await run_export(ExportConfig(swarm=run.swarm_file, out=tmp_path / "model"), asyncio.Event())
    exported = load_file(tmp_path / "model" / "model-00001-of-00001.safetensors")
    trunk = {name.removeprefix("model."): t for name, t in load_file(saved).items() if name.startswith("model.")}
    for name in trunk.keys() & exported.keys():
        torch.testing.assert_close(exported[name], trunk[name], atol=1e-6, rtol=0)
    assert len(trunk.keys() & exported.keys()) > 10
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Of 8 blocks of experts 8 were taken from a replica that a second confirmed." in card
    assert "The trunk was taken from the only replica that could be had, on its word" in card
    assert "| held-out loss | not known |" in card


async def test_an_export_that_is_stopped_or_killed_goes_on_to_the_same_folder(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trained_run(tmp_path, BYTE_RUN, text, n_hosts=1) as run:
        config = ExportConfig(swarm=run.swarm_file, out=tmp_path / "whole", trunk=run.trainer_folder)
        await run_export(config, asyncio.Event())
        wanted = contents(tmp_path / "whole")
        keep = UnfinishedExport.keep
        for n_kept in (1, 4, 8):
            stop, config = asyncio.Event(), replace(config, out=tmp_path / f"stopped-{n_kept}")
            kept: list[ModelPart] = []

            def stopping(
                self: UnfinishedExport,
                part: ModelPart,
                tensors: dict[str, torch.Tensor],
                taken: Taken,
                at: int = n_kept,
            ) -> None:
                keep(self, part, tensors, taken)
                kept.append(part)  # noqa: B023 - called before the next turn
                if len(kept) == at:  # noqa: B023
                    loop.call_soon_threadsafe(stop.set)  # noqa: B023

            loop = asyncio.get_running_loop()
            monkeypatch.setattr(UnfinishedExport, "keep", stopping)
            await run_export(config, stop)
            monkeypatch.setattr(UnfinishedExport, "keep", keep)
            assert not config.out.exists()
            await run_export(config, asyncio.Event())
            assert contents(config.out) == wanted
        out = tmp_path / "killed"
        await killed_export(run, out)
        assert not out.exists()
        await run_export(replace(config, out=out), asyncio.Event())
        assert contents(out) == wanted


async def test_experts_that_nobody_has_are_named_after_a_wait(tmp_path: Path, text: Path) -> None:
    async with run_in_loop(tmp_path, BYTE_RUN, text, n_hosts=0) as run:
        config = ExportConfig(swarm=run.swarm_file, out=tmp_path / "model", wait_for_replicas_s=0.5)
        gone = "experts 0 to 15 of layer 0, experts 0 to 15 of layer 1 have no live replica after a wait of 0.5 s"
        with pytest.raises(UnavailableError, match=gone):
            await run_export(config, asyncio.Event())
        assert not config.out.exists()

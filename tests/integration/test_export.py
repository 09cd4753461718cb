"""A model leaves its swarm: a real run is trained, exported, and read again without the swarm and without Kilohive."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from common.assets import asset_of, asset_store
from common.errors import ConfigError, UnavailableError
from experiments.live.processes import RUN_NODE
from kilohive import load_model
from node.export.command import run_export
from node.export.config import ExportConfig
from node.export.unfinished import UnfinishedExport
from node.model.generation import Generation, Prompt
from node.model.next_token import GenerationConfig
from node.trainer.config import EvaluateConfig, SampleConfig
from node.trainer.evaluation import run_evaluate
from node.trainer.sample_command import run_sample
from node.trainer.trained_model import trained_model
from protocol.run_assets import DataConfig
from tests.support.contributing import RunInLoop, run_in_loop
from tests.support.exported import HASH, contents
from tests.support.swarm_parts import small_manifest
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from node.export.unfinished import Taken
    from node.model.trunk import Trunk
    from node.trainer.exported.layout import ModelPart
    from protocol.manifest import Manifest

CLOSE: Any = {"atol": 1e-4, "rtol": 0.0}
ASSET = asset_of(tiny_tokenizer())
PAIRS = DataConfig(tokenizer=ASSET.sha256, tokenizer_bytes=ASSET.n_bytes)
# It learns fast for a few steps; after them the rate is 0, and the run stands still although its trainer is there.
RATES = {"total_tokens": 10_000, "final_lr_fraction": 0.0, "lr": 1e-2, "expert_lr": 1e-2}
BYTE_RUN = small_manifest(codec="fp32", model={**HASH, "gate_heads": 2}, optimizer=RATES)
PAIR_RUN = small_manifest(codec="fp32", model={"gate": "topk", "vocab_size": 300}, data=PAIRS, optimizer=RATES)

STRANGER = """
import importlib.util, json, sys, torch
assert not any(importlib.util.find_spec(name) for name in ("kilohive", "node", "common", "protocol")), sys.path
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.load(f"{out}/ids.pt", weights_only=True)
with torch.no_grad():
    torch.save(model(ids).logits, f"{out}/logits.pt")
read = tokenizer(prompt, return_tensors="pt")
written = model.generate(**read, do_sample=False, max_new_tokens=8)
text = tokenizer.decode(written[0])
print(json.dumps({"read": read["input_ids"].tolist(), "text": text}))
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Row {n}: the square of {n % 50} is {(n % 50) ** 2}." for n in range(3000)))
    return path


@asynccontextmanager
async def trained_run(folder: Path, manifest: Manifest, text: Path, n_hosts: int) -> AsyncIterator[RunInLoop]:
    """A run whose trainer has trained to the last token, saved its trunk and left; its hosts are up."""
    asset_store().add(tiny_tokenizer())
    async with run_in_loop(folder, manifest, text, n_hosts) as run:
        await run.until((run.trainer_folder / "summary.json").exists)
        await run.until(run.trainer.done)
        yield run


@dataclass(frozen=True)
class Greedy:
    """What a model says: logits of some ids, and the ids that it goes on with."""

    logits_BTV: torch.Tensor
    written: list[int]


@torch.no_grad()
def greedy(model: Trunk, ids: torch.Tensor, prompt: list[int]) -> Greedy:
    config = GenerationConfig(max_new_tokens=8, temperature=0)
    steps = Generation(model, [Prompt(ids=prompt, config=config)])
    return Greedy(model(ids), [new.token for step in steps for new in step])


async def read_by_a_stranger(folder: Path, out: Path, ids: torch.Tensor, prompt: str) -> tuple[torch.Tensor, Any]:
    """Logits and text of a process that knows nothing of Kilohive but the folder."""
    torch.save(ids, out / "ids.pt")
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", STRANGER, str(folder), str(out), prompt),
        cwd=out,
        env={**inherited, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules"), "HF_HOME": str(out / "hf")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, errors = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, errors.decode()
    return torch.load(out / "logits.pt", weights_only=True), json.loads(told)


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
    monkeypatch.setattr("node.export.command.AT_ONCE", 1)  # else a stop may end a connection in its handshake
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


async def killed_export(run: RunInLoop, out: Path) -> None:
    """One in a process of its own, which is killed as soon as some of the model has come."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, RUN_NODE, "export", "--join", str(run.swarm_file), "--out", str(out)),
        *("--trunk", str(run.trainer_folder)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    parts = out.with_name(f"{out.name}.partial") / "parts"
    await run.until(lambda: process.returncode is not None or any(parts.glob("[!.]*")))
    assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    await process.wait()


async def test_experts_that_nobody_has_are_named_after_a_wait(tmp_path: Path, text: Path) -> None:
    async with run_in_loop(tmp_path, BYTE_RUN, text, n_hosts=0) as run:
        config = ExportConfig(swarm=run.swarm_file, out=tmp_path / "model", wait_for_replicas_s=0.5)
        gone = "experts 0 to 15 of layer 0, experts 0 to 15 of layer 1 have no live replica after a wait of 0.5 s"
        with pytest.raises(UnavailableError, match=gone):
            await run_export(config, asyncio.Event())
        assert not config.out.exists()

"""A run around a pretrained model learns over real hosts; a stranger's trainer gets all it needs from another."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.assets import AssetStore, asset_store
from tests.support.contributing import run_in_loop
from tests.support.tiny_pretrained import pretrained_manifest, save_pretrained
from tests.support.tiny_tokenizer import SENTENCES

if TYPE_CHECKING:
    from protocol.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    folder = save_pretrained(tmp_path / "model")
    manifest = pretrained_manifest(folder)
    for file in manifest.pretrained.files:
        asset_store().add_file(folder / file.name)
    return manifest


def strangers_trainer(swarm_file: Path, folder: Path, text: Path) -> subprocess.CompletedProcess[str]:
    """One step of a trainer on a machine that has nothing of the run."""
    arguments = ["train", "--join", str(swarm_file), "--out", str(folder / "out"), "--data", str(text), "--steps", "1"]
    return subprocess.run(
        [sys.executable, str(ROOT / "run_node.py"), *arguments, "--plain", "--batch", "1"],
        env={**os.environ, "KILOHIVE_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


@pytest.mark.slow  # a swarm around a pretrained model is in test_export_pretrained.py too
async def test_adapters_learn_and_a_stranger_gets_model_and_tokenizer_from_a_trainer(
    tmp_path: Path, manifest: Manifest
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"{sentence}number {i}\n\n" for i in range(100) for sentence in SENTENCES), encoding="utf-8"
    )
    events = tmp_path / "trainer" / "events.jsonl"

    def steps() -> list[dict[str, float]]:
        rows = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
        return [row for row in rows if row["event"] == "step"]

    async with run_in_loop(tmp_path, manifest, text, n_hosts=1) as run:
        await run.until(lambda: len(steps()) >= 40)
        told = steps()
        assert told[39]["loss"] < told[0]["loss"] - 0.3
        assert told[0]["bits_per_byte"] < told[0]["loss"] / 0.693
        found = await asyncio.to_thread(strangers_trainer, run.swarm_file, tmp_path / "stranger", text)
    assert found.returncode == 0, found.stderr
    assert "Asking the run's trainers for the file" in found.stderr
    assert all(AssetStore(tmp_path / "stranger" / "cache" / "assets").holds(asset) for asset in run.manifest.assets)

"""A real run is trained, and its experts are looked at over its swarm and in the folder that it is exported to."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from node.export.command import run_export
from node.export.config import ExportConfig
from node.trainer.config import InspectConfig
from node.trainer.inspection.command import run_inspect
from tests.support.exported import HASH
from tests.support.exported_runs import RATES, trained_run
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = small_manifest(codec="fp32", model={**HASH, "gate_heads": 2}, optimizer=RATES)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources whose letters differ, so that experts that go by letters tell them apart."""
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    for name, words in (("numbers", "of {n}: the square is {m}"), ("shouts", "NUMBER {n} IS A NUMBER!")):
        rows = [json.dumps({"text": words.format(n=n, m=n * n), "topic": name}) for n in range(1500)]
        (tmp_path / "texts" / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path / "texts"


async def test_a_swarm_and_the_folder_it_leaves_have_experts_that_are_chosen_alike(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"data": texts, "tokens": 1024, "ablate": 1}
    stop = asyncio.Event()
    async with trained_run(tmp_path, MANIFEST, texts, n_hosts=1) as run:
        await run_export(ExportConfig(swarm=run.swarm_file, out=tmp_path / "model", trunk=run.trainer_folder), stop)
        of_swarm: dict[str, Any] = {"swarm": run.swarm_file, "out": run.trainer_folder, "json": tmp_path / "swarm.json"}
        await run_inspect(InspectConfig(**of_swarm, **settings), stop)
    shown = capsys.readouterr().out
    assert f"{run.manifest.run_id} at step " in " ".join(shown.split())
    await run_inspect(InspectConfig(export=tmp_path / "model", json=tmp_path / "folder.json", **settings), stop)
    live, folder = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("swarm", "folder"))
    assert live["nats"] == pytest.approx(folder["nats"], abs=1e-4)
    for in_swarm, alone in zip(live["layers"], folder["layers"], strict=True):
        assert [expert["pairs"] for expert in in_swarm["experts"]] == [expert["pairs"] for expert in alone["experts"]]
        assert alone["about_topics"]["bits"] > alone["about_topics"]["high"]
        assert in_swarm["about_topics"] == alone["about_topics"]
    for in_swarm, alone in zip(live["groups"], folder["groups"], strict=True):
        assert in_swarm["rise"]["nats"] == pytest.approx(alone["rise"]["nats"], abs=1e-3)
    by_name = {group["taken"]: group["rise"]["nats"] for group in folder["groups"]}
    assert by_name["all of layer 0"] != 0.0

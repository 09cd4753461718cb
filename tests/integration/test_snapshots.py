"""A coordinator exports its run while the run trains, and leaves nothing of an export when it stops or is killed."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.live.processes import Node, end_nodes, events, wait_until
from kilohive import load_model
from tests.support.contributing import run_in_loop
from tests.support.exported import HASH
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from protocol.manifest import Manifest

pytestmark = pytest.mark.timeout(300)  # each export is a process that imports torch and joins the run

RUN = small_manifest(codec="fp32", model={**HASH, "gate_heads": 2})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))


def versions(snapshot: Path) -> dict[str, int]:
    """The version of each part of an exported model."""
    index = json.loads((snapshot / "model.safetensors.index.json").read_text(encoding="utf-8"))
    found: dict[str, int] = index["metadata"]["versions"]
    return found


async def test_a_run_that_trains_is_exported_again_and_again_and_the_last_export_is_kept(tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "run" / "snapshots"
    text.write_text("\n\n".join(f"Row {n}: the square of {n % 50} is {(n % 50) ** 2}." for n in range(3000)))
    seen: dict[str, dict[str, int]] = {}

    def told() -> list[dict[str, Any]]:
        rows = events(tmp_path / "run" / "coordinator" / "events.jsonl")
        assert not [row for row in rows if row["event"] == "snapshot_failed"]
        for row in (found := [row for row in rows if row["event"] == "snapshot"]):
            if row["folder"] not in seen and Path(row["folder"]).exists():
                seen[row["folder"]] = versions(Path(row["folder"]))
        return found

    async with run_in_loop(tmp_path, RUN, text, n_hosts=1, steps=10**6, snapshot_every_s=2.0, keep_snapshots=1) as run:
        await run.until(lambda: len(told()) >= 1)
        await run.until(lambda: len(told()) >= 2)
    names = [Path(row["folder"]).name for row in told()]
    assert names == sorted(set(names))
    assert [row["deleted"] for row in told()] == [[], *([name] for name in names[:-1])]
    assert sorted(path.name for path in folder.iterdir()) == [names[-1], "run.txt"]
    for before, after in pairwise(seen.values()):
        assert all(after[part] > version for part, version in before.items())
    model = load_model(folder / names[-1])
    assert torch.isfinite(model(torch.randint(0, 256, (2, 16)))).all()
    assert len(load_file(folder / names[-1] / "model-00001-of-00001.safetensors")) > 10
    assert (
        "The trunk was taken from the only replica that could be had" in (folder / names[-1] / "README.md").read_text()
    )


def coordinator(out: Path, manifest: Manifest) -> Node:
    out.mkdir(exist_ok=True)
    (out / "wanted.toml").write_text(manifest.to_toml(), encoding="utf-8")
    flags = ("--manifest", str(out / "wanted.toml"), "--out", str(out), "--snapshot-every-s", "1")
    return Node(out / "coordinator", ("coordinator", *flags))


def unfinished(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "snapshots").glob("*.partial"))


def test_an_export_ends_with_its_coordinator_and_one_that_was_left_behind_is_discarded(tmp_path: Path) -> None:
    nodes = [coordinator(tmp_path / "run", RUN)]
    try:
        wait_until(lambda: len(unfinished(tmp_path / "run")) == 1, "an export, which waits for the first host")
        (left_behind,) = unfinished(tmp_path / "run")
        nodes[0].kill()
        nodes.append(coordinator(tmp_path / "run", RUN))
        wait_until(lambda: unfinished(tmp_path / "run") not in ([], [left_behind]), "an export of the next one")
        assert len(unfinished(tmp_path / "run")) == 1
        began = time.monotonic()
        assert nodes[1].stop() == 0
        assert time.monotonic() - began < 3.0
        assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["run.txt"]
    finally:
        end_nodes(nodes[1:])

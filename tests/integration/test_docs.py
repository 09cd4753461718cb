"""The examples in the docs that need a swarm, run as they are printed."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch

from experiments.live.processes import process_swarm
from node.host.block_store import block_path
from node.model.checkpoint import read_checkpoint
from protocol.identity import Identity
from protocol.manifest import BlockId, all_blocks
from protocol.security import Security
from tests.support.docs import ROOT, python_blocks
from tests.support.exported import HASH, exported, show_no_progress_bar
from tests.support.swarm_parts import running_swarm, small_manifest

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from protocol import expert_pb2 as pb

MANIFEST = small_manifest()
ENDPOINT = "127.0.0.1:4000"
HOST_ID = "12D3KooWBmwkXtQAy2bqbBrAA6XzaGhB8Vu6rSYqZ3yQ3Vdp8Zfn"


def example(page: str) -> str:
    (code,) = [block.code for block in python_blocks(with_swarm=True) if block.page == ROOT / page]
    return code


def test_every_example_that_needs_a_swarm_is_run_here() -> None:
    assert sorted(str(block.page.relative_to(ROOT)) for block in python_blocks(with_swarm=True)) == [
        "README.md",
        "docs/export.md",
        "docs/protocol.md",
    ]


def test_the_readmes_model_trains_over_a_swarm_and_its_hosts_step_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with process_swarm(tmp_path / "runs/run", MANIFEST) as swarm:
        host = swarm.host("host", "0/0-3,1/0-3")
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(compile(example("README.md"), "README.md", "exec"), names)  # noqa: S102 - an example of ours
        assert host.stop() == 0
    assert len(names["losses"]) == 20
    assert all(math.isfinite(loss) for loss in names["losses"])
    assert capsys.readouterr().out.endswith("0 calls failed\n")
    versions = {block: checkpoint_version(host.folder, block) for block in all_blocks(MANIFEST.model)}
    assert all(version > 0 for block, version in versions.items() if block.layer == 0)
    assert not any(version > 0 for block, version in versions.items() if block.layer == 1)


def checkpoint_version(folder: Path, block: BlockId) -> int:
    stored = read_checkpoint(block_path(folder, block))
    return int(stored[1]["version"]) if stored else 0


def test_a_peer_written_by_hand_can_call_a_host() -> None:
    with running_swarm(MANIFEST, n_hosts=0) as swarm:
        security = Security(Identity.generate())
        host = swarm.add_host(security.identity.peer_id, all_blocks(MANIFEST.model), security=security)
        code = example("docs/protocol.md")
        for told, real in ((ENDPOINT, host.server.endpoint), (HOST_ID, host.peer_id)):
            assert told in code
            code = code.replace(told, real)
        names: dict[str, Any] = {}
        exec(compile(code, "protocol.md", "exec"), names)  # noqa: S102
        about: pb.DescribeResponse = names["about"]
        assert about.run_id == MANIFEST.run_id
        assert names["y_TD"].shape == (2, 16)
        assert bool(torch.isfinite(names["y_TD"]).all())
        assert host.runtime.tokens_total == 2


def test_an_exported_model_is_read_by_transformers_and_by_kilohive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").mkdir()
    exported(tmp_path / "models" / "run", small_manifest(model=HASH))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds that folder to it
    show_no_progress_bar()
    exec(compile(example("docs/export.md"), "export.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.startswith("[")

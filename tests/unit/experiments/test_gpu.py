"""The arms of `longer` in a given time: how many tokens that makes, and the file that is left."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from common.errors import ConfigError
from experiments import gpu
from experiments.arms.arm import Arm, TrainSpec
from experiments.arms.choosing import PRODUCT
from experiments.gpu import GpuConfig, run_arms, tokens_for

if TYPE_CHECKING:
    from pathlib import Path

DENSE = Arm(label="dense", hidden=8)
FEW = replace(PRODUCT, label="8 of 16", experts=16, hidden=4)


def test_all_arms_get_the_tokens_that_fit_in_whole_steps_and_no_more_than_asked() -> None:
    config = GpuConfig(batch=8, tokens=100_000)
    assert tokens_for(config, [1e-3, 3e-3], 100.0) == 21_250 // 1024 * 1024
    assert tokens_for(config, [1e-6, 3e-6], 100.0) == 100_000 // 1024 * 1024
    assert tokens_for(config, [1.0, 3.0], -5.0) == 1024, "one step is the least"


def test_every_arm_is_in_the_file_with_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "spec_of", small)
    said = StringIO()
    config = GpuConfig(tokens=2048, batch=4, device="cpu", text="summaries", out=tmp_path / "new" / "gpu.json")
    run_arms(config, (DENSE, FEW), Console(file=said, width=200))
    document = json.loads(config.out.read_bytes())
    assert list(document["trials"]) == ["dense", "8-of-16"]
    for trial in document["trials"].values():
        assert trial["result"]["tokens"] == 2048
        assert 3.0 < trial["result"]["nats_per_byte"] < 6.0
    assert document["device"] == "cpu"
    assert "2,048 tokens for each of 2 arms" in said.getvalue()


def test_what_cannot_be_trained_is_named_and_an_interrupt_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--batch: must be 1 or more, is 0"):
        run_arms(GpuConfig(batch=0), (DENSE,), Console(file=StringIO()))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(gpu, "run_arms", interrupted)
    assert gpu.main() == 130


def small(config: GpuConfig, arm: Arm, tokens: int) -> TrainSpec:
    return TrainSpec(
        arm=arm, seed=0, tokens=tokens, lr=8e-3, expert_lr=8e-3, d_model=32, layers=1, batch=config.batch,
        eval_bytes=512, final_eval_bytes=512, text=config.text,
    )  # fmt: skip

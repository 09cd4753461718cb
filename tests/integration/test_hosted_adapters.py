"""Adapters around a frozen seed that real hosts hold: they learn what they learn in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from experiments.adapters.adapting import AdapterGrid, AdapterRun
from experiments.adapters.arms import AdapterTrial, windows_of
from experiments.adapters.domains import WEAK
from experiments.adapters.experiment import run_trial
from experiments.adapters.seed import TextPlan
from tests.support.tiny_domain import tiny_domain
from tests.support.tiny_pretrained import save_pretrained
from tests.support.trials import Context

if TYPE_CHECKING:
    from pathlib import Path

TEXT = TextPlan(training=12, tuning=2, held_out=3, window_tokens=16, layers=2)
RUN = AdapterRun(grid=AdapterGrid(rank=2, experts=64, per_token=4), layers=2, rate=3e-2, seed=0)
HERE = AdapterTrial(text=TEXT, ways=("gated",), windows=12, run=RUN)


def test_adapters_that_hosts_hold_learn_what_they_learn_in_one_process(tmp_path: Path) -> None:
    model = str(save_pretrained(tmp_path / "model"))
    places = {"here": HERE, "hosts": replace(HERE, hosts=2)}
    found = {}
    for name, trial in places.items():
        assert AdapterTrial.from_json(trial.to_json()) == trial
        context = Context(tmp_path / name / "trial")
        context.folder.mkdir(parents=True, exist_ok=True)
        found[name] = run_trial(trial, model, tiny_domain, context)
    here, hosted = found["here"], found["hosts"]
    untrained = run_trial(
        AdapterTrial(text=TEXT, ways=("alone",)), model, tiny_domain, Context(tmp_path / "x" / "trial")
    )
    nats = {name: float(np.mean(windows_of(result, "gated", WEAK))) for name, result in found.items()}
    assert nats["here"] < float(np.mean(windows_of(untrained, "alone", WEAK))) - 0.2
    assert nats["hosts"] == pytest.approx(nats["here"], rel=0.01), "int8 on the wire is the only difference"
    # Two layers, each called by two hosts at most, forward and backward.
    steps = len(WEAK) * TEXT.training // 2
    assert steps * 2 * 2 <= hosted["calls_ok"] <= 2 * steps * 2 * 2
    assert hosted["calls_failed"] == 0
    assert hosted["pairs"]["answered"] == hosted["pairs"]["chosen"] > 0
    assert hosted["others_cpu_seconds"] > 0
    assert hosted["tokens"] == here["tokens"]

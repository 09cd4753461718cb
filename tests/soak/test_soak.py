"""Half an hour of everyday life: six hosts and two trainers, and one trouble after the other. Run by `make soak`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from protocol.manifest import AveragingConfig
from tests.support.nat import network
from tests.support.soak import Soak, missing, plan
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.timeout(7200), pytest.mark.leaks_checked_per_module]

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
HOSTS = tuple(f"host-{n}" for n in range(6))
TRAINERS = ("trainer-0", "trainer-1")
MANIFEST = small_manifest(
    model={"experts_per_layer": 64, "experts_per_block": 8, "experts_per_token": 4, "d_model": 64, "context": 64},
    optimizer={"total_tokens": 1_000_000_000},
    averaging=AveragingConfig(target_replicas=3, period_s=4.0),
)
AUTO = ("--blocks", "auto", "--max-blocks", "10", "--set", "recheck_s=2", "--threads", "1")
TRAIN = (
    "--steps", "1000000", "--batch", "4", "--micro-batches", "1", "--n-shards", "2", "--eval-every", "200", "--set",
    "eval_bytes=4096", "--save-every", "100",
)  # fmt: skip
MAX_GROWTH_MB, MAX_GROWTH_DESCRIPTORS = 60.0, 24.0


def test_nothing_is_lost_wedged_or_leaked_and_no_log_has_a_trace(tmp_path: Path) -> None:
    if why := missing():
        pytest.fail(why, pytrace=False)
    with network() as net:
        soak = Soak(tmp_path, net, MANIFEST)
        try:
            soak.coordinator()
            for name in HOSTS:
                soak.host(name, *AUTO)
            for shard, name in enumerate(TRAINERS):
                soak.trainer(name, *TRAIN, "--shard", str(shard))
            soak.run(plan(SEED, HOSTS, TRAINERS), MINUTES * 60)
            growths = soak.growths()
            grown = {
                name: growth
                for name, growth in growths.items()
                if growth[0] > MAX_GROWTH_MB or growth[1] > MAX_GROWTH_DESCRIPTORS
            }
            steps = {name: soak.members[name].steps() for name in TRAINERS}
            print(json.dumps({"troubles": len(soak.told), "steps": steps, "growth": growths}))
            assert soak.problems == []
            assert soak.traces() == []
            assert grown == {}, "MB and descriptors"
        finally:
            soak.close()

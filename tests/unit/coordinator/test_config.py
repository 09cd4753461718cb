"""From a coordinator's or a local swarm's flags to a manifest, and which flags a run that exists contradicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from common.errors import ConfigError
from coordinator.config import CoordinatorConfig, LocalConfig, check_evaluators, check_same_run, manifest_of
from protocol.identity import Identity
from protocol.manifest import AveragingConfig

if TYPE_CHECKING:
    from pathlib import Path


def test_flags_that_repeat_the_manifest_are_no_conflict(tmp_path: Path) -> None:
    config = LocalConfig(out=tmp_path, experts=64, d_model=64, lr=1e-3, replicas=3, averaging_codec="int8")
    check_same_run(config, manifest_of(config, owner="x", total_tokens=5), "here")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"replicas": 3}, r"averaging\.target_replicas: is 3, but the run in here has 2"),
        ({"averaging_codec": "int8"}, r"averaging\.codec: is int8, but the run in here has bf16"),
        ({"averaging_period_s": 9.0}, r"averaging\.period_s: is 9\.0, but the run in here has 1\.0"),
    ],
)
def test_how_replicas_are_averaged_cannot_change(changes: dict[str, Any], sentence: str) -> None:
    held = manifest_of(LocalConfig(replicas=2, averaging_codec="bf16"), owner="x", total_tokens=5)
    check_same_run(LocalConfig(), held, "here")
    with pytest.raises(ConfigError, match=sentence):
        check_same_run(LocalConfig(**changes), held, "here")


def test_a_coordinators_flags_describe_the_averaging() -> None:
    config = CoordinatorConfig(
        replicas=3,
        averaging_codec="bf16",
        averaging_period_s=0.5,
        clip_radius=0.25,
        max_rate_scale=1.5,
        max_staleness=8,
    )
    assert manifest_of(config, owner="x", total_tokens=5).averaging == AveragingConfig(
        target_replicas=3, codec="bf16", period_s=0.5, clip_radius=0.25, max_rate_scale=1.5, max_staleness=8
    )
    with pytest.raises(ConfigError, match=r"averaging\.clip_radius: must be from"):
        manifest_of(CoordinatorConfig(clip_radius=0.0), owner="x", total_tokens=5)


def test_evaluators_are_peer_ids_and_few() -> None:
    peer_ids = tuple(Identity.generate().peer_id for _ in range(5))
    check_evaluators(())
    check_evaluators(peer_ids[:4])
    with pytest.raises(ConfigError, match=r"--evaluators: must be at most 4, each named once, are 5"):
        check_evaluators(peer_ids)
    with pytest.raises(ConfigError, match=r"--evaluators: peer id: 'trainer' is not an Ed25519 peer id"):
        check_evaluators(("trainer",))

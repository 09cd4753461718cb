"""Everybody starts again at once, as after a power cut: what hosts have on their disks is what the run goes on from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.live.processes import wait_until
from node.host.block_store import block_path
from node.host.events import AnnouncedEvent
from node.model.checkpoint import read_metadata
from protocol.manifest import all_blocks
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.live.processes import Node, ProcessSwarm

MANIFEST = small_manifest(
    model={"experts_per_layer": 32, "experts_per_token": 4, "d_model": 32, "expert_hidden": 16, "context": 32},
    optimizer={"lr": 5e-3, "expert_lr": 5e-3, "total_tokens": 60 * 8 * 32, "warmup_tokens": 500},
)
HALVES = {"host-0": "0/0-7", "host-1": "1/0-7"}
TRAIN = ("--steps", "10", "--batch", "4", "--eval-every", "0", "--set", "eval_bytes=2048")


def stored_versions(host: Node) -> dict[str, int]:
    """Of which blocks a host has a checkpoint, and how many steps these have had."""
    paths = {block_id: block_path(host.folder, block_id) for block_id in all_blocks(MANIFEST.model)}
    return {str(block_id): int(read_metadata(path)["version"]) for block_id, path in paths.items() if path.exists()}


def start_with_room_for_all(swarm: ProcessSwarm, name: str) -> Node:
    state = swarm.folder / name
    return swarm.start(
        name, "host", "--join", str(swarm.swarm_file), "--state", str(state), "--max-blocks", "16", "--threads", "1"
    )


def test_no_host_begins_anew_what_another_that_starts_as_well_has_on_its_disk(swarm: ProcessSwarm, text: Path) -> None:
    hosts = [swarm.host(name, blocks) for name, blocks in HALVES.items()]
    trainer = swarm.trainer("trainer", "--data", str(text), *TRAIN)
    trainer.wait_for("done", timeout_s=100)
    wait_until(trainer.child.ended, "the trainer left")
    assert [host.stop() for host in hosts] == [0, 0]
    stored = {host.folder.name: stored_versions(host) for host in hosts}
    assert [len(versions) for versions in stored.values()] == [8, 8]
    learnt = {block: version for versions in stored.values() for block, version in versions.items()}
    assert min(learnt.values()) > 0

    again = [start_with_room_for_all(swarm, name) for name in HALVES]
    for host in again:
        host.wait_for("announced", count=2)
        announced = host.told(AnnouncedEvent)[-1].versions
        assert announced.items() >= stored[host.folder.name].items()
        assert announced.items() <= learnt.items(), "what it does not have itself, it has from the other"

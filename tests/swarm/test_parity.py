"""The swarm computes what one process computes: 50 steps over real processes against LocalMoE, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from experiments.live.processes import process_swarm
from node.data import open_dataset
from node.host.block_store import block_path
from node.membership.config import SwarmConfig
from node.model.checkpoint import read_checkpoint
from node.model.experts.state import block_tensors
from node.model.moe import LocalExperts, LocalMoE
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.remote_moe import RemoteMoE
from node.trainer.swarm_client import SwarmClient
from node.trainer.train_step import StepConfig, Training, build_trunk
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from common.errors import TooFewExpertsError
    from node.data import TextDataset
    from node.model.moe import Experts, MoE
    from protocol.manifest import Manifest

STEPS = 50
TOLERANCE = 1e-9
MANIFEST = small_manifest(
    seed=3, codec="fp64", dtype="fp64", optimizer={"warmup_tokens": 500, "total_tokens": STEPS * 128}
)


def fail(error: TooFewExpertsError) -> None:
    raise error


def training(manifest: Manifest, experts: Experts, layers: list[MoE], dataset: TextDataset) -> Training:
    model = build_trunk(manifest, layers, torch.Generator().manual_seed(manifest.seed))
    # One micro-batch: with more in flight, the order of the hosts' steps is not defined.
    return Training(manifest, model, experts, dataset, StepConfig(batch=8, micro_batches=1), fail)


def run(what: Training) -> list[float]:
    try:
        return [what.step().loss for _ in range(STEPS)]
    finally:
        what.close()


def test_three_host_processes_train_exactly_like_one_process(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n}th sentence says that {n} times {n} is {n * n}." for n in range(400)))
    dataset = open_dataset(text, cache_dir=tmp_path / "cache", seed=0)
    local = LocalExperts(MANIFEST)
    gates = [torch.Generator().manual_seed(9) for _ in range(4)]
    local_layers: list[MoE] = [LocalMoE(local, layer, gates[layer]) for layer in range(2)]
    reference = run(training(MANIFEST, local, local_layers, dataset))

    with process_swarm(tmp_path / "swarm", MANIFEST) as swarm:
        hosts = [swarm.host(f"host-{i}", blocks) for i, blocks in enumerate(("0/0-1,1/0", "0/2,1/1-2", "0/3,1/3"))]
        config = SwarmConfig(swarm=swarm.swarm_file)
        with SwarmClient(config, DispatchConfig(call_timeout_s=60)) as client:
            client.wait_for_all_blocks(60)
            remote_layers: list[MoE] = [RemoteMoE(client.dispatcher, layer, gates[2 + layer]) for layer in range(2)]
            losses = run(training(client.manifest, client.dispatcher, remote_layers, dataset))
            assert client.dispatcher.calls_failed == 0
        for host in hosts:
            assert host.stop() == 0

    for step, (ours, wanted) in enumerate(zip(losses, reference, strict=True)):
        assert abs(ours - wanted) <= TOLERANCE * abs(wanted), f"step {step}"
    assert losses[-1] < 0.9 * losses[0]
    for block in [block for layer in local.blocks.values() for block in layer]:
        path = next(p for h in hosts if (p := block_path(h.folder, block.id)).exists())
        stored = read_checkpoint(path)
        assert stored is not None
        for name, tensor in block_tensors(block).items():
            torch.testing.assert_close(stored[0][name], tensor, rtol=0, atol=TOLERANCE, msg=f"{block.id} {name}")
        assert stored[1]["version"] == str(block.version)

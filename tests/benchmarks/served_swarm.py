"""SmolLM2 with 1,024 adapters, served over HTTP by a swarm of processes, for benchmarks of serving.

A coordinator, four hosts and `serve` are processes as a person starts them. The trunk is that of one training step, so
that adapters are no longer the zeros that they begin as.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.pretrained_source import SMOLLM2
from common.settings import configured
from coordinator.blocks import block_list_text, split_blocks
from coordinator.config import CoordinatorConfig, manifest_of
from coordinator.pretrained import keep_pretrained
from experiments.harness.provenance import ROOT
from experiments.live.processes import process_swarm
from node.data import open_dataset
from node.membership.config import SwarmConfig
from node.model.pretrained_files import language_model
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.run_files import open_tokenizer
from node.trainer.swarm_client import SwarmClient
from node.trainer.train_step import StepConfig
from node.trainer.trunk_state import TrainingProgress, save_trunk
from tests.benchmarks.swarm_training import training_over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from experiments.live.processes import Node, ProcessSwarm
    from node.data import TextDataset
    from node.model.trunk import Trunk
    from protocol.manifest import Manifest

HOSTS: Final = 4
EXPERTS: Final = 1024
TEXT: Final = ROOT / "docs" / "architecture.md"
"""Prompts are of this text, and so is the training step's."""
START_TIMEOUT_S, CALL_TIMEOUT_S = 300.0, 60.0
"""A server reads its model's weights first, which takes half a minute on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class ServedSwarm:
    """A model that is served at `url`, and whoever takes part.

    `model` is the same one, in this process over the same hosts, `seed` the pretrained one that is in it; `tokens` are
    those of a text to go on from.
    """

    url: str
    server: Node
    hosts: tuple[Node, ...]
    model: Trunk
    seed: PreTrainedModel
    tokens: tuple[int, ...]

    def prompts(self, n: int, n_tokens: int) -> list[list[int]]:
        """Return `n` different pieces of the text, of `n_tokens` each; SystemExit where it is too short for that."""
        if n * n_tokens > len(self.tokens):
            most = len(self.tokens) // n
            raise SystemExit(f"--prompt-tokens: {TEXT.name} has {most} tokens for each of {n} prompts, is {n_tokens}")
        return [list(self.tokens[start : start + n_tokens]) for start in range(0, n * n_tokens, n_tokens)]

    def hosts_cpu_s(self) -> float:
        """Return the processor time of all hosts so far, with their p2pd."""
        return sum(host.cpu_seconds() for host in self.hosts)

    def cpu_s(self) -> float:
        """Return the processor time of the server and all hosts so far, with their p2pd."""
        return self.server.cpu_seconds() + self.hosts_cpu_s()


@contextmanager
def served_smollm2(context: int, threads: int) -> Iterator[ServedSwarm]:
    """The model of `context` tokens over fresh hosts; each process computes with `threads` threads."""
    settings = {"name": "bench", "model": SMOLLM2, "context": context, "experts": EXPERTS}
    config = configured(CoordinatorConfig, settings)
    manifest = manifest_of(config, owner="", total_tokens=config.total_tokens)
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
        swarm = stack.enter_context(process_swarm(Path(folder), manifest))
        keep_pretrained(manifest, swarm.folder, SMOLLM2)
        hosts = _hosts(swarm, manifest, threads)
        client = stack.enter_context(
            SwarmClient(SwarmConfig(swarm=swarm.swarm_file), DispatchConfig(call_timeout_s=CALL_TIMEOUT_S))
        )
        client.wait_for_all_blocks(START_TIMEOUT_S)
        dataset = _dataset(client.manifest, swarm.folder)
        model = _trained(client, dataset, swarm.folder)
        server = swarm.server("server", swarm.folder, "--threads", str(threads))
        yield ServedSwarm(
            url=server.wait_for_url(START_TIMEOUT_S),
            server=server,
            hosts=hosts,
            model=model,
            seed=language_model(client.manifest.pretrained),
            tokens=tuple(dataset.train.tolist()),
        )


def _hosts(swarm: ProcessSwarm, manifest: Manifest, threads: int) -> tuple[Node, ...]:
    """Hosts that share the blocks of every layer."""
    shares = enumerate(split_blocks(manifest.model, HOSTS))
    return tuple(swarm.host(f"host-{index}", block_list_text(blocks), threads=threads) for index, blocks in shares)


def _dataset(manifest: Manifest, folder: Path) -> TextDataset:
    return open_dataset(TEXT, cache_dir=folder / "data", seed=manifest.seed, tokenizer=open_tokenizer(manifest, ""))


def _trained(client: SwarmClient, dataset: TextDataset, folder: Path) -> Trunk:
    """The model after one step, whose trunk is saved in `folder`."""
    with training_over(client, StepConfig(batch=1, micro_batches=1), dataset) as training:
        training.step()
        progress = TrainingProgress(step=training.steps_done, version=training.version, run_tokens=training.run_tokens)
        save_trunk(folder, training, progress)
        return training.model.eval()

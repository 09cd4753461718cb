"""Train one arm in this process with the product's own parts, from a spec to figures. Resumes from its folder.

Shapes: B sequences, T positions, V vocabulary, N windows in all.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional

from common.atomic_file import write_atomically
from experiments.arms.arm import TrainSpec, cost
from experiments.arms.gates import TableGate, gate_of
from experiments.arms.life import LOOKS, ablations, busiest_blocks, held_out_loads, look
from experiments.arms.specialisation import specialisation
from experiments.arms.tables import NgramTables
from experiments.arms.text import open_text
from node.host.block_store import BlockStore
from node.model.devices import pick_device
from node.model.moe import LocalExperts, MoE
from node.model.transformer import DenseFfn, Transformer
from node.trainer.train_step import StepConfig, Training
from node.trainer.trunk_state import TrainingProgress, load_trunk, save_trunk
from protocol.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from common.errors import TooFewExpertsError
    from experiments.harness.experiment import Result, TrialContext
    from node.data import TextDataset
    from node.model.experts.block import Block
    from node.model.moe import Experts
    from node.model.trunk import Trunk
    from node.trainer.train_step import StepResult
    from protocol.manifest import Manifest

CHECKPOINT_EVERY_S = 60.0
PROGRESS_EVERY_STEPS = 5


class NoExperts:
    """What a dense arm calls: nobody. Tables of n-grams, if it has them, learn at the rate that experts would."""

    def __init__(self, trunk: Transformer, tables: NgramTables | None) -> None:
        self.blocks: dict[int, list[Block]] = {}
        self.tables = tables
        if tables is not None:
            tables.watch(trunk)

    @property
    def run_tokens(self) -> int:
        """The place in the schedule of rates."""
        return 0 if self.tables is None else self.tables.run_tokens

    @run_tokens.setter
    def run_tokens(self, tokens: int) -> None:
        if self.tables is not None:
            self.tables.run_tokens = tokens


@dataclass(frozen=True, kw_only=True)
class AnyModel:
    """A transformer, wherever the experts are that it calls."""

    manifest: Manifest
    trunk: Transformer
    device: torch.device

    @property
    def layers(self) -> list[MoE]:
        """The layers of experts, in order."""
        return [module for module in self.trunk.modules() if isinstance(module, MoE)]


@dataclass(frozen=True, kw_only=True)
class Model(AnyModel):
    """A transformer, and its experts in this process."""

    experts: LocalExperts | NoExperts


def build_model(spec: TrainSpec, device: torch.device, experts: LocalExperts | None = None) -> Model:
    """Build the model as it is before training, from the spec alone; `experts`, if given, replace its own."""
    manifest, generator = spec.manifest(), torch.Generator().manual_seed(spec.seed)
    arm = spec.arm
    if not arm.experts:
        dense = [DenseFfn(spec.d_model, arm.hidden, generator) for _ in range(spec.layers)]
        trunk = _trunk(manifest, dense, generator, device)
        tables = NgramTables(manifest, arm.tables).to(device) if arm.tables else None
        return Model(manifest=manifest, trunk=trunk, experts=NoExperts(trunk, tables), device=device)
    experts = experts or LocalExperts(manifest, device)
    trunk = trunk_with_experts(spec, manifest, experts, device)
    return Model(manifest=manifest, trunk=trunk, experts=experts, device=device)


def trunk_with_experts(spec: TrainSpec, manifest: Manifest, experts: Experts, device: torch.device) -> Transformer:
    """The trunk and gates of an arm that has experts, as they are before training, wherever the experts are."""
    arm, generator = spec.arm, torch.Generator().manual_seed(spec.seed)
    gates = [gate_of(arm, manifest.model, generator) for _ in range(spec.layers)]
    layers = [MoE(gate, experts, layer) for layer, gate in enumerate(gates)]
    trunk = _trunk(manifest, layers, generator, device)
    for gate in gates:
        if isinstance(gate, TableGate):
            gate.watch(trunk)
    return trunk


def _trunk(
    manifest: Manifest, layers: Iterable[torch.nn.Module], generator: torch.Generator, device: torch.device
) -> Transformer:
    return Transformer(manifest.model, list(layers), generator).to(device, DTYPES[manifest.dtype])


def build_training(model: Model, spec: TrainSpec, dataset: TextDataset) -> Training:
    """One micro-batch a step: experts and trunk step alike."""
    experts = cast("Experts", model.experts)
    config = StepConfig(batch=spec.batch, micro_batches=1, in_flight=1, seed=spec.seed)
    return Training(model.manifest, model.trunk, experts, dataset, config, _give_up)


def _give_up(error: TooFewExpertsError) -> None:
    raise error


@dataclass(kw_only=True)
class Log:
    """What a training run has measured so far."""

    held_out: list[tuple[int, float]] = field(default_factory=list)
    """Tokens, and nats per byte then."""
    train: list[tuple[int, float]] = field(default_factory=list)
    """Tokens, and the mean training loss since the point before."""
    life: list[dict[str, Any]] = field(default_factory=list)
    """Tokens, and the statistics of each layer's gate then."""
    seconds: float = 0.0
    """The seconds of training steps alone."""

    cpu_seconds: float = 0.0
    """Their processor time, which other processes that wait for the processor do not lengthen."""


class TrainRun:
    """One run of a spec; `go` trains it to its end, from the last checkpoint if there is one."""

    def __init__(
        self, spec: TrainSpec, context: TrialContext, dataset: TextDataset, model: Model | None = None
    ) -> None:
        self.spec, self._context, self._dataset = spec, context, dataset
        self.model = model or build_model(spec, pick_device(context.device))
        self.last_step = spec.steps
        self.keeps_checkpoints = not spec.arm.tables
        """Tables are in no checkpoint: what has them begins anew."""
        self.training = build_training(self.model, spec, dataset)
        self.log = Log()
        self._store = BlockStore(context.folder, self.model.manifest, self.model.device)
        self._saved_at = time.monotonic()

    def go(self) -> None:
        """Train, measuring on the way."""
        self._resume()
        losses = list[float]()
        for step in range(self.training.steps_done, self.last_step):
            cpu = time.process_time()
            result = self._step()
            self.log.cpu_seconds += time.process_time() - cpu
            losses.append(result.loss)
            self.log.seconds += result.seconds
            if self._is_due(step + 1):
                self._measure(losses)
                losses = []
            if self._ends_part(step + 1, LOOKS) and self.model.layers:
                self._look()
            if (step + 1) % PROGRESS_EVERY_STEPS == 0:
                nats = result.loss / self._dataset.train_bytes_per_token
                self._context.progress(step + 1, self.last_step, f"training loss {nats:.3f} nats per byte")
            if self.keeps_checkpoints and not losses and time.monotonic() - self._saved_at > CHECKPOINT_EVERY_S:
                self.save()
        self.training.close()

    def _step(self) -> StepResult:
        return self.training.step()

    def _is_due(self, step: int) -> bool:
        return step == self.last_step or self._ends_part(step, self.spec.evaluations)

    def _ends_part(self, step: int, parts: int) -> bool:
        before, done = (n * parts // self.spec.steps for n in (step - 1, step))
        return done > before

    def _measure(self, losses: list[float]) -> None:
        nats_N = nats_per_window(self.model.trunk, self._dataset, self.spec, self.spec.eval_bytes)
        tokens = self.training.run_tokens
        self.log.held_out.append((tokens, float(nats_N.mean())))
        self.log.train.append((tokens, sum(losses) / len(losses) / self._dataset.train_bytes_per_token))

    def _look(self) -> None:
        ids_BT = next(iter(self._dataset.held_out_batches(self.spec.batch, self.spec.context)))
        layers = look(self.model, self.training.probe, ids_BT)
        self.log.life.append({"tokens": self.training.run_tokens, "layers": layers})

    def save(self) -> None:
        """Write what `go` goes on from."""
        for blocks in self.model.experts.blocks.values():
            for block in blocks:
                self._store.write(block.id, *self._store.copy(block))
        save_trunk(
            self._context.folder,
            self.training,
            TrainingProgress(step=self.training.steps_done, **_counters(self.training)),
        )
        write_atomically(self._context.folder / "log.json", json.dumps(asdict(self.log)).encode())
        self._saved_at = time.monotonic()

    def load(self, folder: Path) -> bool:
        """Take trunk, experts and moments from where `save` has put them; False if it has not."""
        if load_trunk(folder, self.training) is None:
            return False
        store = BlockStore(folder, self.model.manifest, self.model.device)
        for blocks in self.model.experts.blocks.values():
            blocks[:] = [store.load_or_new(block.id) for block in blocks]
        return True

    def _resume(self) -> bool:
        if not self.load(self._context.folder):
            return False
        saved = json.loads((self._context.folder / "log.json").read_bytes())
        for name in ("held_out", "train"):
            saved[name] = [tuple(point) for point in saved[name]]
        self.log = Log(**saved)
        return True


def _counters(training: Training) -> dict[str, Any]:
    return {"version": training.version, "run_tokens": training.run_tokens, "own_tokens": training.own_tokens}


def nats_per_window(trunk: Transformer, dataset: TextDataset, spec: TrainSpec, max_bytes: int) -> torch.Tensor:
    """Mean nats per byte of each held-out window, [N] float64: the same windows for every arm with the same tokens."""
    nats_N = -log_likelihood(trunk, dataset.held_out_batches(spec.batch, spec.context, max_bytes)).mean(1)
    return nats_N / dataset.held_out_bytes_per_token


@torch.no_grad()
def log_likelihood(trunk: Trunk, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Log probability [N, T] float64 of each token of windows [B, T + 1] but their first."""
    trunk.eval()
    device, found = trunk.device, []
    for ids in batches:
        ids_BT = ids.to(device)
        logits_BTV = trunk(ids_BT[:, :-1])
        loss_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
        found.append(-loss_BT.double().cpu())
    return torch.cat(found)


def result_of(run: TrainRun, dataset: TextDataset) -> Result:
    """The figures of a run that has ended."""
    log = run.log
    return {
        "tokens": run.training.run_tokens,
        "held_out": log.held_out,
        "train": log.train,
        "life": log.life,
        **(worth_of(run.model, run.spec, dataset) if run.model.layers else {}),
        "seconds": round(log.seconds, 1),
        "cpu_seconds": round(log.cpu_seconds, 1),
        **figures_of(run.model, run.spec, dataset),
    }


def worth_of(model: AnyModel, spec: TrainSpec, dataset: TextDataset) -> Result:
    """What the experts' load on held-out text costs hosts, and what the model loses without some of them."""

    def nats_of(n_bytes: int) -> float:
        return float(nats_per_window(model.trunk, dataset, spec, n_bytes).mean())

    loads = held_out_loads(model, dataset, spec.batch)
    return {"busiest_block": busiest_blocks(loads), "ablated": ablations(model, loads, spec.seed, nats_of)}


def figures_of(model: AnyModel, spec: TrainSpec, dataset: TextDataset) -> Result:
    """What a trained model is worth on held-out text, how it uses its experts, and what it costs."""
    gates, in_bytes = [asdict(layer.gate.stats()) for layer in model.layers], not spec.arm.vocabulary
    nats_N = nats_per_window(model.trunk, dataset, spec, spec.final_eval_bytes)
    return {
        "cost": asdict(cost(spec)),
        "nats_per_byte": float(nats_N.mean()),
        "window_nats": [round(nats, 4) for nats in nats_N.tolist()],
        "gates": gates,
        "specialisation": specialisation(model, dataset, spec.batch, spec.seed) if gates and in_bytes else {},
    }


def train(spec: dict[str, Any], context: TrialContext) -> Result:
    """A trial that is one training run."""
    train_spec = TrainSpec.from_json(spec)
    dataset = open_text(train_spec.text, vocabulary=train_spec.arm.vocabulary)
    run = TrainRun(train_spec, context, dataset)
    run.go()
    return result_of(run, dataset)

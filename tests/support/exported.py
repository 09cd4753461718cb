"""Exported models without a swarm: random weights, written as `export` writes what it has downloaded."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.logging import disable_progress_bar

from node.export.command import pretrained_parts
from node.export.small_files import small_files
from node.export.unfinished import Taken, UnfinishedExport
from node.model.moe import LocalExperts
from node.trainer.exported.layout import expert_tensor, groups_of, parts_of, trunk_tensors
from node.trainer.exported.modeling_kilohive import KilohiveForCausalLM
from node.trainer.exported.modeling_kilohive_pretrained import KilohivePretrainedForCausalLM
from node.trainer.exported.sums import SUMS, file_sum, sums_text
from node.trainer.train_step import build_model
from protocol.manifest import TRUNK, BlockId
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from node.export.pretrained_model import PretrainedParts
    from node.model.trunk import Trunk
    from node.trainer.exported.layout import ModelPart
    from protocol.manifest import Manifest

TAKEN = Taken(version=7, word="two replicas", run_tokens=4096)
CARD = "# a model of a test\n"
HASH: dict[str, Any] = {"gate": "hash", "gate_reads": "tokens", "gate_score": "softmax", "smear": 2}
"""What new runs have, but for the number of heads."""


@torch.no_grad()
def random_model(manifest: Manifest) -> tuple[Trunk, LocalExperts]:
    """A model none of whose numbers are as they were drawn from the run's seed, but for what never changes.

    A pretrained model that it is built around has to be on this machine.
    """
    generator = torch.Generator().manual_seed(manifest.seed)
    experts = LocalExperts(manifest)
    model = build_model(manifest, experts, generator).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("bias_E"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
    for block in (block for of_layer in experts.blocks.values() for block in of_layer):
        for weight in block.params.values():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype), alpha=0.2)
    return model, experts


def part_tensors(
    part: ModelPart, model: Trunk, experts: LocalExperts, pretrained: PretrainedParts | None = None
) -> dict[str, torch.Tensor]:
    if part.id == TRUNK:
        return trunk_tensors(model)
    if not isinstance(part.id, BlockId):
        assert pretrained is not None
        return pretrained.tensors(part)
    block = experts.blocks[part.id.layer][part.id.block]
    return {expert_tensor(experts.manifest.model, part.id, name): t for name, t in block.params.items()}


def unfinished_export(
    out: Path, manifest: Manifest, max_bytes: int = 10_000_000, pretrained: PretrainedParts | None = None
) -> UnfinishedExport:
    parts = parts_of(manifest, None if pretrained is None else pretrained.outline)
    return UnfinishedExport(out, manifest.run_id, groups_of(parts, max_bytes))


def write_export(
    unfinished: UnfinishedExport,
    manifest: Manifest,
    of: tuple[Trunk, LocalExperts],
    tokenizer: bytes | None,
    pretrained: PretrainedParts | None = None,
) -> None:
    """What `export` does once it has joined a swarm, without the swarm."""
    if not unfinished.begin():
        unfinished.clear()
        return
    for group in unfinished.groups:
        if unfinished.record(group) is None:
            for part in group.parts:
                if not unfinished.has(part):
                    unfinished.keep(part, part_tensors(part, *of, pretrained), TAKEN)
            unfinished.write(group)
    taken = unfinished.taken()
    unfinished.finish(small_files(manifest, unfinished.groups, taken, CARD, tokenizer, pretrained))


def exported(
    out: Path, manifest: Manifest | None = None, tokenizer: bytes | None = None, max_bytes: int = 10_000_000
) -> tuple[Trunk, Manifest]:
    """The folder `out`, and the model that is in it."""
    manifest = manifest or small_manifest(model=HASH)
    model, experts = random_model(manifest)
    pretrained = pretrained_parts(manifest)
    unfinished = unfinished_export(out, manifest, max_bytes, pretrained)
    write_export(unfinished, manifest, (model, experts), tokenizer, pretrained)
    return model, manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_by_transformers(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of the folder, by the code that it brings, as it is in this checkout."""
    show_no_progress_bar()
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (KilohiveForCausalLM, KilohivePretrainedForCausalLM)}
    return kinds[name].from_pretrained(folder, dtype=dtype or "auto").eval()


def show_no_progress_bar() -> None:
    """It has a thread that stays."""
    disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def flipped(path: Path, place: int = -1) -> Iterator[None]:
    """A file with one bit of it turned, for a while."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    yield
    data[place] ^= 1
    path.write_bytes(data)


def sealed(folder: Path) -> None:
    """Have the hashes fit what is in the folder, as somebody who changes it on purpose would."""
    (folder / SUMS).unlink()
    (folder / SUMS).write_text(sums_text({path.name: file_sum(path) for path in folder.iterdir()}))

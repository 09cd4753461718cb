"""Experts to offer, D=16, H=8, in float64, and how they are made better; streams and calls in memory; peers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dht.view import PeerInfo
from node.trainer.train_step import next_token_loss

if TYPE_CHECKING:
    from collections.abc import Iterable

    from node.data import TextDataset
    from node.model.expert_file import ExpertId
    from node.model.moe import LocalExperts
    from node.model.transformer import Transformer
    from protocol.announcements import Role

SHAPES = {"w_in": (16, 8), "w_out": (8, 16)}


def weights(seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {**normal, **changes}


def present(experts: LocalExperts, place: ExpertId) -> dict[str, torch.Tensor]:
    """The weights of the expert that is there."""
    block, row = _where(experts, place)
    return {name: tensor[row].clone() for name, tensor in block.params.items()}


def put(experts: LocalExperts, place: ExpertId, given: dict[str, torch.Tensor]) -> None:
    """The offered expert in the place of the present one, as a host would."""
    block, row = _where(experts, place)
    for name, tensor in given.items():
        block.params[name][row] = tensor


def _where(experts: LocalExperts, place: ExpertId) -> Any:
    model = experts.manifest.model
    return experts.blocks[place.layer][place.block(model).block], place.row(model)


def train_one(
    experts: LocalExperts, model: Transformer, dataset: TextDataset, place: ExpertId, steps: int
) -> dict[str, torch.Tensor]:
    """The expert of a place after so many steps of its own, everything else as it was; `experts` has it then."""
    block, row = _where(experts, place)
    before = {name: p.clone() for name, p in block.params.items()}
    others = torch.arange(len(block.experts)) != row
    for step in range(steps):
        ids = dataset.train_batch(step, shard=0, n_shards=1, batch=16, context=model.context, seed=1)
        next_token_loss(model, ids, torch.device("cpu")).backward()
        for name, p in block.params.items():
            p[others] = before[name][others]
    return present(experts, place)


def peer(peer_id: str, role: Role, **fields: Any) -> PeerInfo:
    known: dict[str, Any] = {
        "endpoint": "127.0.0.1:4000",
        "software": "",
        "started_s": 0.0,
        "n_blocks": 0,
        "tokens_per_s": 0.0,
        "run_tokens": 0,
        "queue_tokens": 0,
        "expiration_s": 2e9,
    }
    return PeerInfo(peer_id=peer_id, role=role, **{**known, **fields})


class MemoryStream:
    """What a caller sends, message by message."""

    def __init__(self, messages: Iterable[bytes]) -> None:
        self._messages = iter(messages)
        self.read = 0

    async def receive(self) -> bytes | None:
        self.read += 1
        return next(self._messages, None)

    async def send(self, raw: bytes) -> None:
        raise AssertionError("the callee answers when it has all")


class Call:
    """The context of a call in memory; `caller` has signed it."""

    def __init__(self, metadata: tuple[tuple[str, bytes], ...] = ()) -> None:
        self._metadata = metadata

    def time_remaining(self) -> float:
        return 20.0

    def invocation_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._metadata

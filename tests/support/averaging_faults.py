"""Pairs of nodes that exchange in memory, and hooks on their cable that spoil what passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from node.averaging import pieces
from protocol import averaging_pb2 as pb
from protocol.tensors import encode
from tests.support.averaging_parts import (
    BLOCK,
    Cable,
    MemoryReplica,
    Outcome,
    changed,
    exchange_config,
    exchange_in_memory,
    replica_set,
    two_replicas,
    unchanged,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import torch

    from protocol.manifest import AveragingCodec, BlockId

    Hook = Callable[[str, int, bytes], Awaitable[Sequence[bytes]]]


@dataclass
class Pair:
    """A dials, B answers."""

    a: tuple[MemoryReplica, ...]
    b: tuple[MemoryReplica, ...]
    codec: AveragingCodec = "fp32"

    def __post_init__(self) -> None:
        self.a_set, self.b_set = replica_set(*self.a), replica_set(*self.b)

    async def exchange(self, hook: Hook = unchanged, capacity: int = 1, **changes: Any) -> Outcome:
        a, b = (exchange_config(name, codec=self.codec, **changes) for name in ("peer-a", "peer-b"))
        blocks = [replica.id for replica in self.a]
        return await exchange_in_memory((self.a_set, a), (self.b_set, b), blocks, Cable(hook, capacity))

    def raws(self) -> list[tuple[bytes, bytes]]:
        return [(a.raw(), b.raw()) for a, b in zip(self.a, self.b, strict=True)]


def pair(codec: AveragingCodec = "fp32", blocks: Sequence[BlockId] = (BLOCK,), **changes: Any) -> Pair:
    both = [two_replicas(block_id, **changes) for block_id in blocks]
    return Pair(tuple(a for a, _ in both), tuple(b for _, b in both), codec)


def kind(raw: bytes) -> str:
    return pb.ExchangeMessage.FromString(raw).WhichOneof("body") or ""


def spoil(sender: str, at: str, change: Callable[[pb.ExchangeMessage], object]) -> Hook:
    """Changes the first message of a kind that this side sends."""
    done = False

    async def hook(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        nonlocal done
        if done or who != sender or kind(raw) != at:
            return (raw,)
        done = True
        return (changed(raw, change),)

    return hook


def spoil_tensor(sender: str, tensor: str, values: torch.Tensor) -> Hook:
    """Puts other values, with the hash they need, into the first piece of a tensor."""
    done = False

    async def hook(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        nonlocal done
        message = pb.ExchangeMessage.FromString(raw)
        if done or who != sender or message.piece.tensor != tensor:
            return (raw,)
        done = True
        shape = tuple(message.piece.values.shape)
        message.piece.values.CopyFrom(encode(values.expand(shape), "fp32"))
        message.piece.hash = pieces._hash(message.piece)
        return (message.SerializeToString(),)

    return hook


def late_answer() -> Hook:
    """The first answer comes second."""
    first: list[bytes] = []

    async def hook(who: str, number: int, raw: bytes) -> Sequence[bytes]:
        if who != "answerer" or kind(raw) != "piece":
            return (raw,)
        first.append(raw)
        return () if len(first) == 1 else (first[1], first[0]) if len(first) == 2 else (raw,)

    return hook

"""How a token's experts are chosen and weighed, in a model that a Kilohive swarm has trained. For transformers.

It needs nothing but torch, and draws nothing at random: all that it computes with is in the folder.
"""

# Shapes: N tokens, D width, Q heads of the gate, E experts of a layer, K experts of a token, M of them chosen by heads
#         before, n sub-keys of a table (in names: U), R candidates or rows, X strides.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CODE_BITS = 62
MIX = (-4658895280553007687, -7723592293110705685)
CANDIDATES_PER_CHOICE = 2


class KilohiveGate(nn.Module, ABC):
    """Each head chooses as many experts, none that one before it has; one softmax weighs them all.

    Experts are chosen by score + bias and weighed by the score: the logit, or its sigmoid.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.n_experts, self.n_heads = config.num_experts, config.gate_heads
        self.is_sigmoid = config.gate_score == "sigmoid"
        self.per_head = config.num_experts_per_tok // config.gate_heads

    def forward(self, x_NQD: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [N, K] and weights [N, K], whose rows sum to 1, by what each head reads."""
        dtype = next((t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), torch.float32)
        ids_NK = torch.empty(len(x_NQD), 0, dtype=torch.int64, device=x_NQD.device)
        logits = []
        for head in range(self.n_heads):
            ids, logits_of_head = self.choose(head, x_NQD[:, head].to(dtype), ids_NK)
            ids_NK = torch.cat((ids_NK, ids), 1)
            logits.append(logits_of_head)
        logits_NK = torch.cat(logits, 1)
        return ids_NK, torch.softmax(F.logsigmoid(logits_NK) if self.is_sigmoid else logits_NK, dim=-1)

    @abstractmethod
    def choose(self, head: int, x_ND: Tensor, taken_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and logits of a head's experts, none of them among `taken_NM`."""

    def scores(self, logits: Tensor) -> Tensor:
        """What biases are added to."""
        return logits.sigmoid() if self.is_sigmoid else logits


class KilohiveTopKGate(KilohiveGate):
    """One linear map scores every expert."""

    bias_E: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.expert_keys_ED = weight(config.num_experts, config.hidden_size)
        self.register_buffer("bias_E", torch.zeros(config.num_experts))

    def choose(self, head: int, x_ND: Tensor, taken_NM: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - all alike
        """Choose the best of all."""
        selection_NE = self.scores(F.linear(x_ND, self.expert_keys_ED)) + self.bias_E
        ids = selection_NE.scatter(1, taken_NM, -torch.inf).topk(self.per_head).indices
        return ids, (F.embedding(ids, self.expert_keys_ED) * x_ND[:, None]).sum(-1)


class KilohiveProductKeyGate(KilohiveGate):
    """Expert i * n + j has the score of row i plus that of column j (arXiv 1907.05242)."""

    bias_E: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width, self.n = config.hidden_size, round(config.num_experts**0.5)
        is_mapped = config.gate_reads == "hidden"
        self.query_weight = weight(config.gate_heads * width, width) if is_mapped else None
        self.sub_keys_2SC = weight(2, self.n, width // 2)
        self.register_buffer("bias_E", torch.zeros(config.num_experts))

    def choose(self, head: int, x_ND: Tensor, taken_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the best where the best rows cross the best columns."""
        if self.query_weight is not None:
            x_ND = F.linear(x_ND, self.query_weight.view(self.n_heads, *x_ND.shape[1:], -1)[head])
        halves = [F.rms_norm(half_NC, half_NC.shape[-1:]) for half_NC in x_ND.chunk(2, dim=-1)]
        first_NU, second_NU = (F.linear(half_NC, self.sub_keys_2SC[side]) for side, half_NC in enumerate(halves))
        rows_NR, columns_NR = self._shortlist(first_NU, second_NU, taken_NM.shape[1])
        logits_NRR = first_NU.gather(1, rows_NR)[:, :, None] + second_NU.gather(1, columns_NR)[:, None, :]
        candidates = (rows_NR[:, :, None] * self.n + columns_NR[:, None, :]).flatten(1)
        selection = self.scores(logits_NRR.flatten(1)) + self.bias_E[candidates]
        for taken_N in taken_NM.unbind(1):
            selection = selection.masked_fill(candidates == taken_N[:, None], -torch.inf)
        ids = candidates.gather(1, selection.topk(self.per_head).indices)
        return ids, first_NU.gather(1, ids // self.n) + second_NU.gather(1, ids % self.n)

    def _shortlist(self, first_NU: Tensor, second_NU: Tensor, n_taken: int) -> tuple[Tensor, Tensor]:
        """The best rows and columns; those of biases that are in units of the logits count on average."""
        if not self.is_sigmoid:
            bias_UU = self.bias_E.view(self.n, self.n)
            first_NU, second_NU = first_NU + bias_UU.mean(1), second_NU + bias_UU.mean(0)
        n_best = min(CANDIDATES_PER_CHOICE * self.per_head + n_taken, self.n)
        return first_NU.topk(n_best).indices, second_NU.topk(n_best).indices


class KilohiveHashGate(KilohiveGate):
    """A walk over the experts from a start and by a stride that a hash of the code decides; all weigh alike."""

    strides_X: Tensor
    salt_Q: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.register_buffer("strides_X", torch.ones(config.gate_strides, dtype=torch.int64))
        self.register_buffer("salt_Q", torch.ones(config.gate_heads, dtype=torch.int64))

    def choose(self, head: int, x_ND: Tensor, taken_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the first of the walk that are not taken."""
        bits = x_ND[:, :CODE_BITS] > 0
        code_N = (bits * (1 << torch.arange(bits.shape[1], device=x_ND.device))).sum(1)
        hash_N = mixed(code_N * self.salt_Q[head])
        stride_N = self.strides_X[mixed(hash_N).remainder(len(self.strides_X))]
        n_steps = min(self.n_experts, self.per_head + taken_NM.shape[1])
        step_R = torch.arange(n_steps, device=x_ND.device)
        walk_NR = (hash_N.remainder(self.n_experts)[:, None] + step_R * stride_N[:, None]) % self.n_experts
        free_NR = (walk_NR[:, :, None] != taken_NM[:, None, :]).all(2)
        wish_NR = free_NR * (n_steps - step_R)
        ids = walk_NR.gather(1, wish_NR.topk(self.per_head).indices)
        return ids, x_ND.new_zeros(ids.shape)


GATES: dict[str, type[KilohiveGate]] = {
    "topk": KilohiveTopKGate,
    "product_key": KilohiveProductKeyGate,
    "hash": KilohiveHashGate,
}


def mixed(value_N: Tensor) -> Tensor:
    """A hash of int64 numbers whose every bit depends on all of theirs: splitmix64 (OOPSLA 2014)."""
    for multiplier in MIX:
        value_N = (value_N ^ (value_N >> 31)) * multiplier
    return value_N ^ (value_N >> 32)


def weight(*shape: int) -> nn.Parameter:
    """A weight that a folder's shards fill: nothing is drawn here."""
    return nn.Parameter(torch.zeros(shape))

"""Dispatch and combine: the pairs of one layer go to the peers that hold the experts, their sums come back.

Called from compute threads (one per micro-batch in flight); the calls themselves run on the event loop. One request
per peer and layer. A peer that fails is reported to the directory; its pairs go to other replicas while the step's
deadline lasts, and are dropped if there are none.

Shapes: T tokens, K experts per token, D model width, E experts of a layer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch

from common.errors import TooFewExpertsError
from node.credit.answered import AnsweredPairs, PairCounts
from node.model.pairs import Combined, flat_pairs
from node.rpc.expert_codec import max_tokens_per_call
from node.trainer.dispatch.backward import BackwardBatch, BackwardWork
from node.trainer.dispatch.client import ExpertClient
from node.trainer.dispatch.delivery import Delivery, DeliveryLimits
from node.trainer.dispatch.forward import ForwardBatch, ForwardWork, SentPart
from node.trainer.dispatch.loop_bridge import LoopBridge
from node.trainer.dispatch.peers import Peers
from node.trainer.dispatch.plan import LayerChoice, Planner, SplitLimits
from protocol.limits import MAX_VALUE
from protocol.manifest import BlockId
from protocol.tensors import DTYPES, check_range, magnitude

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from node.membership.swarm import Swarm
    from node.trainer.dispatch.backward import BackwardAnswer
    from node.trainer.dispatch.forward import ForwardAnswer, ForwardCall
    from node.trainer.dispatch.peers import ReplicaSource
    from protocol.manifest import Manifest
    from protocol.security import Caller

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """Deadlines and minima of a step."""

    call_timeout_s: float = 20.0
    k_min: int = 1
    avoid_failed_s: float = 5.0
    """How long a peer is avoided after its first failure; doubled by each further one in a row."""
    hedge: bool = False
    """Send a forward that is later than 95 % of the latest ones to other replicas as well."""
    teach: bool = True
    """Backwards step the experts; else they ask for gradients alone."""
    seed: int = 0


@dataclass(frozen=True)
class Ticket:
    """Links a backward to its forward."""

    choice: LayerChoice
    sent: list[SentPart]


@dataclass(frozen=True)
class StalenessSum:
    """Staleness of some gradients, in steps."""

    n_answers: int = 0
    total: int = 0
    largest: int = 0

    def plus(self, steps: int) -> StalenessSum:
        """Return the sum with one more answer."""
        return StalenessSum(self.n_answers + 1, self.total + steps, max(self.largest, steps))


class Dispatcher:
    """The remote experts of every layer of a run, as seen by one trainer.

    `run_tokens` is set by the trainer before each step: the hosts' place in the learning-rate schedule. `client` counts
    the bytes on the wire, `answered` the pairs that each peer has answered.
    """

    def __init__(
        self,
        manifest: Manifest,
        directory: ReplicaSource,
        client: ExpertClient,
        config: DispatchConfig,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.manifest, self.run_tokens = manifest, 0
        self._directory, self.client, self._config = directory, client, config
        self._peers = Peers(directory, config.avoid_failed_s, random.Random(config.seed))
        self._calls = LoopBridge(loop)
        self._dtype = DTYPES[manifest.dtype]
        self._split_limits = SplitLimits(
            experts_per_block=manifest.model.experts_per_block, max_tokens=max_tokens_per_call(manifest)
        )
        self._live: dict[int, tuple[int, torch.Tensor]] = {}
        self._lock = threading.Lock()
        self.answered = AnsweredPairs()
        self._shares = self.answered.taker()
        self._staleness = StalenessSum()
        self._invalid_at: set[int] = set()

    @property
    def calls_ok(self) -> int:
        """Calls that were answered well."""
        return self._peers.calls_ok

    @property
    def calls_failed(self) -> int:
        """Calls that were not; those given up because another was faster count in neither."""
        return self._peers.calls_failed

    @property
    def hedges_sent(self) -> int:
        """Late forwards that were sent elsewhere too."""
        return self._peers.hedges_sent

    @property
    def hedges_won(self) -> int:
        """Hedged calls that another replica answered first."""
        return self._peers.hedges_won

    @property
    def in_flight(self) -> int:
        """Calls that compute threads wait for now."""
        return self._calls.in_flight

    def live_experts(self, layer: int) -> torch.Tensor:
        """`live_E` (bool): experts of `layer` whose block has a replica that is not avoided."""
        generation = self._directory.generation
        cached = self._live.get(layer)
        if cached is not None and cached[0] == generation:
            return cached[1]
        model = self.manifest.model
        live_E = torch.zeros(model.experts_per_layer, dtype=torch.bool)
        for block in range(model.blocks_per_layer):
            if self._directory.replicas(BlockId(layer, block)):
                experts = model.block_experts(block)
                live_E[experts.start : experts.stop] = True
        self._live[layer] = (generation, live_E)
        return live_E

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        """Combine over the peers; `keep` says that a backward will follow.

        Raises:
            InvalidInputError: the tokens or weights hold what no peer would take; none was asked.
            TooFewExpertsError: some token's experts answered fewer than `k_min` times.
            DrainingError: the dispatcher is closed.
        """
        choice = LayerChoice(layer, expert_ids_TK.cpu(), weights_TK.detach().cpu())
        planner, x_TD = self._planner(choice), x_TD.detach().cpu().to(self._dtype)
        check_range(x_TD, f"x of MoE layer {layer}")
        check_range(choice.weights_TK, f"gate weights of MoE layer {layer}")
        answers = self._forward(planner, ForwardBatch(layer, x_TD, keep))
        combined_TD = torch.zeros_like(x_TD)
        answered = torch.zeros(choice.expert_ids_TK.numel(), dtype=torch.bool)
        for call, answer in answers:
            combined_TD.index_add_(0, call.part.tokens, answer.sums_TD)
            answered[call.part.flat] = True
        answered_TK = answered.view(choice.expert_ids_TK.shape)
        self._check_enough(choice, answered_TK, planner)
        sent = [SentPart.of(call, answer) for call, answer in answers]
        return Combined(combined_TD, answered_TK, Ticket(choice, sent))

    def backward(self, ticket: Ticket, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients for the tokens [T, D] and, flattened, for every choice [T * K]; zero where no peer answered.

        Where `grad_TD` holds what no peer would take, no expert steps and all gradients are NaN: whoever scales a loss
        (`torch.amp.GradScaler`) looks for that and leaves the step out. Raises DrainingError once closed.
        """
        grad_TD, choice = grad_TD.detach().cpu().to(self._dtype), ticket.choice
        if not self._is_valid(grad_TD, choice.layer):
            return torch.full_like(grad_TD, math.nan), grad_TD.new_full((choice.expert_ids_TK.numel(),), math.nan)
        work = BackwardWork(self.manifest, self.client, self._batch(choice.layer, grad_TD))
        delivery = Delivery(self._planner(choice), work, self._peers, self._calls, self._limits())
        grad_x_TD = torch.zeros_like(grad_TD)
        grad_weight = grad_TD.new_zeros(choice.expert_ids_TK.numel())
        for call, answer in delivery.run(map(work.request, ticket.sent)):
            grad_x_TD.index_add_(0, call.part.tokens, answer.tokens_TD)
            grad_weight[call.part.flat] = answer.weight_P
            self.answered.add(call.part.replica.peer_id, PairCounts(backward=len(call.part.flat)))
            self._count_staleness(answer)
        return grad_x_TD, grad_weight

    def take_pairs_by_peer(self) -> Counter[str]:
        """Pairs of forwards that each peer answered since the last call."""
        return Counter({peer_id: pairs.forward for peer_id, pairs in self._shares.take().items() if pairs.forward})

    def take_staleness(self) -> tuple[float, int]:
        """Mean and largest staleness (steps) of the gradients that hosts took since the last call; 0 without any."""
        with self._lock:
            taken, self._staleness = self._staleness, StalenessSum()
        return taken.total / max(taken.n_answers, 1), taken.largest

    def wait_for_change(self, timeout_s: float) -> None:
        """Return when the live replicas change, at the latest after `timeout_s`; raises DrainingError when closed."""
        self._calls.run(self._directory.wait_for_change(timeout_s), timeout_s)

    def __deepcopy__(self, memo: object) -> Self:
        """A copy of a model calls the same swarm."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle a Dispatcher, which is connected to a swarm: save the model's state_dict()")

    def close(self) -> None:
        """Cancel what is in flight; compute threads that wait get DrainingError, and so do those that call later."""
        self._calls.close()

    def _planner(self, choice: LayerChoice) -> Planner:
        return Planner(choice, self._peers, self._split_limits)

    def _limits(self, hedge_after_s: float | None = None) -> DeliveryLimits:
        return DeliveryLimits(deadline=time.monotonic() + self._config.call_timeout_s, hedge_after_s=hedge_after_s)

    def _batch(self, layer: int, grad_TD: torch.Tensor) -> BackwardBatch:
        return BackwardBatch(layer, grad_TD, self.run_tokens, no_step=not self._config.teach)

    def _forward(self, planner: Planner, batch: ForwardBatch) -> list[tuple[ForwardCall, ForwardAnswer]]:
        limits = self._limits(self._peers.late_after_s() if self._config.hedge else None)
        work = ForwardWork(self.manifest, self.client, self._peers, batch)
        parts, _ = planner.plan(flat_pairs(planner.choice.expert_ids_TK))
        answers = Delivery(planner, work, self._peers, self._calls, limits).run(map(work.request, parts))
        for call, _ in answers:
            self.answered.add(call.part.replica.peer_id, PairCounts(forward=len(call.part.flat)))
        return answers

    def _is_valid(self, grad_TD: torch.Tensor, layer: int) -> bool:
        valid = magnitude(grad_TD) <= MAX_VALUE
        if not valid and layer not in self._invalid_at:  # once, and again after a good one
            logger.warning("The gradient of MoE layer %d is not finite or beyond %g: no expert steps", layer, MAX_VALUE)
        (self._invalid_at.discard if valid else self._invalid_at.add)(layer)
        return valid

    def _count_staleness(self, answer: BackwardAnswer) -> None:
        if answer.staleness is not None:
            with self._lock:
                self._staleness = self._staleness.plus(answer.staleness)

    def _check_enough(self, choice: LayerChoice, answered_TK: torch.Tensor, planner: Planner) -> None:
        chosen_T = (choice.expert_ids_TK >= 0).sum(1)
        short_T = answered_TK.sum(1) < chosen_T.clamp(max=self._config.k_min)
        if bool(short_T.any()):
            failed_peers = tuple(sorted(planner.failed_peers))
            refusals = f"; refused by hosts: {'; '.join(sorted(planner.refusals))}" if planner.refusals else ""
            raise TooFewExpertsError(
                f"layer {choice.layer}: fewer than {self._config.k_min} experts answered for {int(short_T.sum())} of "
                f"{len(short_T)} tokens; peers that failed: {', '.join(failed_peers) or 'none'}{refusals}",
                failed_peers=failed_peers,
            )


def dispatch_over(
    swarm: Swarm, config: DispatchConfig, make_client: Callable[[Caller], ExpertClient] = ExpertClient
) -> Dispatcher:
    """A dispatcher over a swarm that this node has joined, closed when the node leaves it. Called on its event loop."""
    client = make_client(swarm.security.caller())
    swarm.on_leave(client.close)
    dispatcher = Dispatcher(swarm.manifest, swarm.directory, client, config, asyncio.get_running_loop())
    swarm.on_leave(dispatcher.close)
    return dispatcher

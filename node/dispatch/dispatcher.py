"""Dispatch and combine: the pairs of one layer go to the peers that hold the experts, their sums come back.

Called from compute threads (one per micro-batch in flight); the calls themselves run on the event loop. One request
per peer and layer. A peer that fails is reported to the directory; its pairs go to another replica while the step's
deadline lasts, and are dropped if there is none.

Shapes: T tokens, K experts per token, P pairs, D model width, E experts of a layer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import random
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from node.dispatch.plan import Combined, Part, flat_pairs, split_by_peer
from node.wire import decode_rows, encode_inputs
from protocol import expert_pb2 as pb
from protocol.errors import (
    DeadlineError,
    DrainingError,
    KilohiveError,
    OverloadedError,
    TooFewExpertsError,
    UnavailableError,
    UnknownRequestError,
)
from protocol.limits import REQUEST_ID_BYTES
from protocol.manifest import BlockId
from protocol.tensors import DTYPES, TensorSpec, decode, encode

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from dht.view import Replica
    from node.dispatch.client import ExpertClient
    from protocol.manifest import Manifest

R = TypeVar("R")
logger = logging.getLogger(__name__)

MIN_CALL_S = 0.05
MAX_DOUBLINGS = 6


class ReplicaSource(Protocol):
    """What dispatch needs of the directory: reads from memory, from any thread."""

    @property
    def generation(self) -> int:
        """Changes whenever the live replicas do."""

    def replicas(self, block: BlockId) -> tuple[Replica, ...]:
        """Live replicas of a block, without those of avoided peers."""

    async def wait_for_change(self, timeout_s: float) -> bool:
        """Return at the next change, or after `timeout_s`."""

    def report_failure(self, peer_id: str, retry_after_s: float) -> None:
        """Avoid a peer for a while."""

    def report_success(self, peer_id: str) -> None:
        """A peer answered."""


@dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """Deadlines and minima of a step."""

    call_timeout_s: float = 20.0
    k_min: int = 1
    avoid_failed_s: float = 5.0
    """After a peer's first failure; doubled by each further one in a row."""
    seed: int = 0


@dataclass(frozen=True)
class SentPart:
    """A part that a peer answered: what its backward needs."""

    part: Part
    request_id: bytes
    inputs: pb.Inputs


@dataclass(frozen=True)
class Ticket:
    """Links a backward to its forward."""

    layer: int
    sent: list[SentPart]
    n_pairs: int


class Dispatcher:
    """The remote experts of every layer of a run, as seen by one trainer.

    `run_tokens` is set by the trainer before each step: the hosts' place in the learning-rate schedule.
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
        self._directory, self._client, self._config, self._loop = directory, client, config, loop
        self._random = random.Random(config.seed)
        self._lock = threading.Lock()
        self._in_flight: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self._live: dict[int, tuple[int, torch.Tensor]] = {}
        self.calls_ok = 0
        self.calls_failed = 0
        self._pairs_by_peer: Counter[str] = Counter()
        self._failures_in_a_row: Counter[str] = Counter()

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

        Raises TooFewExpertsError if some token's experts answered fewer than `k_min` times.
        """
        deadline = time.monotonic() + self._config.call_timeout_s
        x_TD, ids_TK, weights_TK = x_TD.detach().cpu(), expert_ids_TK.cpu(), weights_TK.detach().cpu()
        combined_TD = torch.zeros_like(x_TD)
        answered = torch.zeros(ids_TK.numel(), dtype=torch.bool)
        waiting, excluded, sent = flat_pairs(ids_TK), set[str](), list[SentPart]()
        while len(waiting):
            parts, _ = split_by_peer(
                ids_TK, weights_TK, waiting, self._choose(layer, excluded), self.manifest.model.experts_per_block
            )
            failed = [waiting[:0]]
            for outcome in self._send_parts(layer, x_TD, parts, deadline, keep=keep):
                if outcome.sums_TD is None:
                    failed.append(outcome.sent.part.flat)
                    excluded.add(outcome.sent.part.replica.peer_id)
                    continue
                combined_TD.index_add_(0, outcome.sent.part.tokens, outcome.sums_TD)
                answered[outcome.sent.part.flat] = True
                sent.append(outcome.sent)
            waiting = torch.cat(failed).sort().values
        answered_TK = answered.view(ids_TK.shape)
        self._check_enough(layer, ids_TK, answered_TK, excluded)
        return Combined(combined_TD, answered_TK, Ticket(layer, sent, ids_TK.numel()))

    def backward(self, ticket: Ticket, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients for the tokens [T, D] and, flattened, for every choice [T * K]; zero where no peer answered."""
        grad_TD = grad_TD.detach().cpu()
        codec = self.manifest.codec
        messages = [encode(grad_TD[sent.part.tokens], codec) for sent in ticket.sent]
        answers = self._run(self._backward_all(ticket, messages))
        grad_x_TD = torch.zeros_like(grad_TD)
        grad_weight = grad_TD.new_zeros(ticket.n_pairs)
        for sent, answer in zip(ticket.sent, answers, strict=True):
            if answer is None:
                continue
            part = sent.part
            try:
                rows_TD = decode_rows(answer.grad_tokens_TD, "grad_tokens_TD", len(part.tokens), self.manifest)
                spec = TensorSpec(field="grad_weight_P", shape=(len(part.flat),))
                weight_P = decode(answer.grad_weight_P, spec, DTYPES[self.manifest.dtype])
            except KilohiveError as error:
                self._failed(part.replica, error)
                continue
            grad_x_TD.index_add_(0, part.tokens, rows_TD)
            grad_weight[part.flat] = weight_P
        return grad_x_TD, grad_weight

    def take_pairs_by_peer(self) -> Counter[str]:
        """Pairs that each peer answered since the last call."""
        with self._lock:
            taken, self._pairs_by_peer = self._pairs_by_peer, Counter()
        return taken

    def wait_for_change(self, timeout_s: float) -> None:
        """Return when the live replicas change, at the latest after `timeout_s`; raises DrainingError when closed."""
        self._run(self._directory.wait_for_change(timeout_s))

    @property
    def in_flight(self) -> int:
        """Compute threads that wait for peers now."""
        return len(self._in_flight)

    def close(self) -> None:
        """Cancel what is in flight; compute threads that wait get DrainingError, and so does whoever calls later."""
        with self._lock:
            self._closed = True
            in_flight = list(self._in_flight)
        for future in in_flight:
            future.cancel()

    def _choose(self, layer: int, excluded: set[str]) -> dict[int, Replica]:
        chosen = {}
        for block in range(self.manifest.model.blocks_per_layer):
            replicas = [r for r in self._directory.replicas(BlockId(layer, block)) if r.peer_id not in excluded]
            if replicas:
                chosen[block] = self._random.choice(replicas)
        return chosen

    def _send_parts(
        self, layer: int, x_TD: torch.Tensor, parts: Sequence[Part], deadline: float, *, keep: bool
    ) -> list[_Outcome]:
        codec = self.manifest.codec
        sent = [
            SentPart(part, secrets.token_bytes(REQUEST_ID_BYTES), encode_inputs(x_TD[part.tokens], part.pairs, codec))
            for part in parts
        ]
        answers = self._run(self._forward_all(layer, sent, deadline, keep=keep))
        return [self._outcome(one, answer) for one, answer in zip(sent, answers, strict=True)]

    def _outcome(self, sent: SentPart, answer: pb.ForwardResponse | None) -> _Outcome:
        part = sent.part
        if answer is None:
            return _Outcome(sent, None)
        try:
            sums_TD = decode_rows(answer.combined_TD, "combined_TD", len(part.tokens), self.manifest)
        except KilohiveError as error:
            self._failed(part.replica, error)
            return _Outcome(sent, None)
        with self._lock:
            self._pairs_by_peer[part.replica.peer_id] += len(part.flat)
        return _Outcome(sent, sums_TD)

    async def _forward_all(
        self, layer: int, sent: Sequence[SentPart], deadline: float, *, keep: bool
    ) -> list[pb.ForwardResponse | None]:
        async def one(sent_part: SentPart) -> pb.ForwardResponse | None:
            request = pb.ForwardRequest(
                run_id=self.manifest.run_id,
                request_id=sent_part.request_id,
                layer=layer,
                inputs=sent_part.inputs,
                keep_inputs=keep,
            )
            replica = sent_part.part.replica
            try:
                answer = await self._client.forward(replica.endpoint, request, _left_s(deadline))
            except KilohiveError as error:
                self._failed(replica, error)
                return None
            self._succeeded(replica)
            return answer

        return await asyncio.gather(*(one(sent_part) for sent_part in sent))

    async def _backward_all(self, ticket: Ticket, messages: Sequence[pb.Tensor]) -> list[pb.BackwardResponse | None]:
        deadline = time.monotonic() + self._config.call_timeout_s
        return await asyncio.gather(
            *(
                self._backward_part(ticket.layer, sent, message, deadline)
                for sent, message in zip(ticket.sent, messages, strict=True)
            )
        )

    async def _backward_part(
        self, layer: int, sent: SentPart, grad: pb.Tensor, deadline: float
    ) -> pb.BackwardResponse | None:
        """The peer that answered the forward first, then any other replica that holds all its experts."""
        request = pb.BackwardRequest(
            run_id=self.manifest.run_id,
            request_id=sent.request_id,
            layer=layer,
            grad_combined_TD=grad,
            run_tokens=self.run_tokens,
        )
        for replica in (sent.part.replica, *self._alternatives(layer, sent.part)):
            try:
                answer = await self._backward_at(replica.endpoint, request, sent.inputs, deadline)
            except KilohiveError as error:
                self._failed(replica, error)
                continue
            self._succeeded(replica)
            return answer
        return None

    async def _backward_at(
        self, endpoint: str, request: pb.BackwardRequest, inputs: pb.Inputs, deadline: float
    ) -> pb.BackwardResponse:
        try:
            return await self._client.backward(endpoint, request, _left_s(deadline))
        except UnknownRequestError:
            # Dropped to stay within its bounds, or this replica never saw the forward.
            request.inputs.CopyFrom(inputs)
            return await self._client.backward(endpoint, request, _left_s(deadline))

    def _alternatives(self, layer: int, part: Part) -> list[Replica]:
        blocks = torch.unique(part.pairs.expert_P // self.manifest.model.experts_per_block).tolist()
        per_block = [{r.peer_id: r for r in self._directory.replicas(BlockId(layer, b))} for b in blocks]
        common = set.intersection(*(set(replicas) for replicas in per_block)) - {part.replica.peer_id}
        return [per_block[0][peer_id] for peer_id in sorted(common)]

    def _check_enough(
        self, layer: int, ids_TK: torch.Tensor, answered_TK: torch.Tensor, failed_peers: set[str]
    ) -> None:
        chosen_T = (ids_TK >= 0).sum(1)
        short_T = answered_TK.sum(1) < chosen_T.clamp(max=self._config.k_min)
        if bool(short_T.any()):
            raise TooFewExpertsError(
                f"layer {layer}: fewer than {self._config.k_min} experts answered for {int(short_T.sum())} of "
                f"{len(short_T)} tokens; peers that failed: {', '.join(sorted(failed_peers)) or 'none'}",
                failed_peers=tuple(sorted(failed_peers)),
            )

    def _succeeded(self, replica: Replica) -> None:
        with self._lock:
            self.calls_ok += 1
            self._failures_in_a_row.pop(replica.peer_id, None)
        self._directory.report_success(replica.peer_id)

    def _failed(self, replica: Replica, error: KilohiveError) -> None:
        with self._lock:
            self.calls_failed += 1
            self._failures_in_a_row[replica.peer_id] += 1
            doublings = min(self._failures_in_a_row[replica.peer_id] - 1, MAX_DOUBLINGS)
        logger.info("Peer %s at %s failed: %s", replica.peer_id, replica.endpoint, error)
        # A frozen peer costs a step its whole deadline at every try: tries become rare.
        retry_after_s = self._config.avoid_failed_s * 2**doublings
        if isinstance(error, OverloadedError):
            retry_after_s = error.retry_after_s
        self._directory.report_failure(replica.peer_id, retry_after_s)

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run on the event loop and wait, from a compute thread."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise DrainingError("this trainer is leaving")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._in_flight.add(future)
        try:
            # Every call has its own deadline; this one only guards against a loop that has stopped.
            return future.result(2 * self._config.call_timeout_s + 1)
        except concurrent.futures.CancelledError:
            raise DrainingError("this trainer is leaving") from None
        except TimeoutError:
            future.cancel()
            raise UnavailableError("the event loop did not answer: is it still running?") from None
        finally:
            with self._lock:
                self._in_flight.discard(future)


@dataclass(frozen=True)
class _Outcome:
    sent: SentPart
    sums_TD: torch.Tensor | None


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s < MIN_CALL_S:
        raise DeadlineError("the step's deadline passed")
    return left_s

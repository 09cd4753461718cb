"""A layer's forward as dispatch sends it: tokens out, sums back, and what the backward will need of it.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.rpc.expert_codec import decode_rows, encode_pairs_into
from protocol import expert_pb2 as pb
from protocol.limits import REQUEST_ID_BYTES
from protocol.tensors import EncodedRows

if TYPE_CHECKING:
    import torch

    from common.errors import KilohiveError
    from node.trainer.dispatch.client import ExpertClient
    from node.trainer.dispatch.peers import Peers
    from node.trainer.dispatch.plan import Part
    from protocol.manifest import Manifest


@dataclass(frozen=True)
class ForwardCall:
    """What one peer is asked."""

    part: Part
    message: pb.ForwardRequest


@dataclass(frozen=True)
class ForwardAnswer:
    """The part's sums [T, D], and the version of the peer's blocks that they came from."""

    sums_TD: torch.Tensor
    version: int


@dataclass(frozen=True)
class SentPart:
    """A part that a peer answered: what its backward needs."""

    part: Part
    request_id: bytes
    inputs: pb.Inputs
    version: int

    @classmethod
    def of(cls, call: ForwardCall, answer: ForwardAnswer) -> SentPart:
        """Make the sent part from a call and its answer."""
        return cls(call.part, call.message.request_id, call.message.inputs, answer.version)


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one layer, on the CPU; `keep` says that a backward will follow."""

    layer: int
    x_TD: torch.Tensor
    keep: bool


class ForwardWork:
    """Asks for sums. Replicas may be asked for the same pairs at once: a forward changes nothing.

    Tokens are encoded once, as nearly every peer gets nearly all of them.
    """

    def __init__(self, manifest: Manifest, client: ExpertClient, peers: Peers, batch: ForwardBatch) -> None:
        self._manifest, self._client, self._peers, self._batch = manifest, client, peers, batch
        self._rows = EncodedRows(batch.x_TD, manifest.codec)

    def request(self, part: Part) -> ForwardCall:
        """The request for `part`."""
        message = pb.ForwardRequest(
            run_id=self._manifest.run_id,
            request_id=secrets.token_bytes(REQUEST_ID_BYTES),
            layer=self._batch.layer,
            keep_inputs=self._batch.keep,
        )
        self._rows.put(message.inputs.tokens_TD, part.tokens)
        encode_pairs_into(message.inputs.pairs, part.pairs, self._manifest.codec)
        return ForwardCall(part, message)

    def elsewhere(self, part: Part, before: ForwardCall, error: KilohiveError | None) -> ForwardCall:  # noqa: ARG002 - one signature for both ways
        """The request for `part`, whatever became of the one before."""
        return self.request(part)

    def again(self, request: ForwardCall, error: KilohiveError) -> None:
        """Every error of a forward is a failure."""

    async def send(self, request: ForwardCall, timeout_s: float, *, patient: bool) -> pb.ForwardResponse:
        """Call the peer."""
        return await self._client.forward(request.part.replica.address, request.message, timeout_s, patient=patient)

    def accept(self, request: ForwardCall, response: pb.ForwardResponse, seconds: float) -> ForwardAnswer:
        """The checked sums; the peer's cost is learnt from them."""
        part = request.part
        sums_TD = decode_rows(response.combined_TD, "combined_TD", len(part.tokens), self._manifest)
        self._peers.learn(part.replica.peer_id, seconds, len(part.tokens), response.queue_tokens)
        return ForwardAnswer(sums_TD, response.version)

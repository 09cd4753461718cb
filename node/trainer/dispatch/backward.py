"""A layer's backward as dispatch sends it: gradients of the sums out, gradients of tokens and weights back.

The peer that answered the forward is asked first; it has the inputs. A backward steps the experts, and an update
teaches one replica at most once: another replica is asked to step only where the failure proves that the first one has
not, and for the gradients alone everywhere else. Averaging carries the update to the others.

Shapes: T tokens, P pairs, D model width.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.errors import (
    DrainingError,
    NotHostedError,
    OverloadedError,
    RefusedError,
    UnknownRequestError,
    UnknownRunError,
)
from node.rpc.expert_codec import decode_rows, encode_inputs
from protocol import expert_pb2 as pb
from protocol.limits import REQUEST_ID_BYTES
from protocol.security import NotConnectedError
from protocol.tensors import DTYPES, EncodedRows, TensorSpec, decode

if TYPE_CHECKING:
    from common.errors import KilohiveError
    from node.trainer.dispatch.client import ExpertClient
    from node.trainer.dispatch.forward import SentPart
    from node.trainer.dispatch.plan import Part
    from protocol.manifest import Manifest

NOTHING_STEPPED = (
    DrainingError,
    NotConnectedError,
    NotHostedError,
    OverloadedError,
    RefusedError,
    UnknownRequestError,
    UnknownRunError,
)
"""Errors that a host gives before it takes a request, or that come before the request has left."""

MAX_STALENESS = 1_000_000
"""Largest staleness that is believed, in steps."""


@dataclass(frozen=True)
class BackwardCall:
    """What one peer is asked; `origin` is the forward whose gradients these are, `part` all of it or some."""

    part: Part
    message: pb.BackwardRequest
    origin: SentPart


@dataclass(frozen=True)
class BackwardAnswer:
    """Gradients of a part; `staleness` (steps) is None where none could be taken."""

    tokens_TD: torch.Tensor
    weight_P: torch.Tensor
    staleness: int | None


@dataclass(frozen=True)
class BackwardBatch:
    """Gradients of one layer's sums, on the CPU, and the run's tokens: the place in the learning-rate schedule.

    With `no_step` the experts give gradients and learn nothing.
    """

    layer: int
    grad_TD: torch.Tensor
    run_tokens: int
    no_step: bool = False


class BackwardWork:
    """Asks for gradients, and for one step."""

    def __init__(self, manifest: Manifest, client: ExpertClient, batch: BackwardBatch) -> None:
        self._manifest, self._client, self._batch = manifest, client, batch
        self._rows = EncodedRows(batch.grad_TD, manifest.codec)

    def request(self, sent: SentPart) -> BackwardCall:
        """The request to the peer that answered the forward."""
        return BackwardCall(sent.part, self._message(sent.part, sent.request_id, sent.version), sent)

    def elsewhere(self, part: Part, before: BackwardCall, error: KilohiveError | None) -> BackwardCall:
        """The request for `part` to a peer that never saw the forward; it steps if nobody else can have."""
        message = self._message(part, secrets.token_bytes(REQUEST_ID_BYTES), before.origin.version)
        message.inputs.CopyFrom(self._inputs(part, before.origin))
        message.no_step = before.message.no_step or not isinstance(error, NOTHING_STEPPED)
        return BackwardCall(part, message, before.origin)

    def again(self, request: BackwardCall, error: KilohiveError) -> BackwardCall | None:
        """Make the request anew, with the inputs if the peer no longer keeps them."""
        if not isinstance(error, UnknownRequestError) or request.message.HasField("inputs"):
            return None
        message = pb.BackwardRequest()
        message.CopyFrom(request.message)
        message.inputs.CopyFrom(request.origin.inputs)
        return BackwardCall(request.part, message, request.origin)

    async def send(self, request: BackwardCall, timeout_s: float, *, patient: bool) -> pb.BackwardResponse:
        """Call the peer."""
        return await self._client.backward(request.part.replica.address, request.message, timeout_s, patient=patient)

    def accept(self, request: BackwardCall, response: pb.BackwardResponse, seconds: float) -> BackwardAnswer:  # noqa: ARG002 - one signature for both ways
        """The checked gradients."""
        part = request.part
        tokens_TD = decode_rows(response.grad_tokens_TD, "grad_tokens_TD", len(part.tokens), self._manifest)
        spec = TensorSpec(field="grad_weight_P", shape=(len(part.flat),))
        weight_P = decode(response.grad_weight_P, spec, DTYPES[self._manifest.dtype])
        staleness = None if request.message.no_step else min(response.staleness, MAX_STALENESS)
        return BackwardAnswer(tokens_TD, weight_P, staleness)

    def _message(self, part: Part, request_id: bytes, version: int) -> pb.BackwardRequest:
        message = pb.BackwardRequest(
            run_id=self._manifest.run_id,
            request_id=request_id,
            layer=self._batch.layer,
            run_tokens=self._batch.run_tokens,
            version=version,
            no_step=self._batch.no_step,
        )
        self._rows.put(message.grad_combined_TD, part.tokens)
        return message

    def _inputs(self, part: Part, origin: SentPart) -> pb.Inputs:
        # From the message and not from the model's tokens: those may have been changed in place since the forward.
        sent_TD = decode_rows(origin.inputs.tokens_TD, "tokens_TD", len(origin.part.tokens), self._manifest)
        rows = torch.searchsorted(origin.part.tokens, part.tokens)
        return encode_inputs(sent_TD[rows], part.pairs, self._manifest.codec)

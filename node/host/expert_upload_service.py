"""The gRPC service with which a host takes an offered expert in, on the word of evaluators. Runs on the event loop.

Everything is checked before a piece of the file is read: only who brings verdicts that hold has this host receive one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from common.errors import InvalidInputError, OverloadedError, UnavailableError
from common.tasks import within
from dht.view import evaluators_named
from node.host.events import TakenInEvent
from node.host.serving.hosted_blocks import not_hosted
from node.model.expert_file import ExpertId, read_expert
from node.rpc.handlers import timeout_s
from node.rpc.message_stream import Inbox
from node.rpc.upload import INTAKE, UPLOAD_S, offered_in, receive_begin, receive_file, upload_handler
from protocol import contribution_pb2 as pb
from protocol.verdict import check_verdict, needed_verdicts, open_verdict, steps_between

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from common.events import EventLog
    from dht.view import PeerInfo
    from node.host.serving.runtime import Runtime
    from node.limits.rate_limits import RateLimits
    from node.model.expert_file import Weights
    from node.rpc.handlers import ServerStream
    from protocol.manifest import Manifest
    from protocol.verdict import Offered

    Context = grpc.aio.ServicerContext[Any, Any]
logger = logging.getLogger(__name__)

MAX_UPLOADS = 1
"""The most uploads at once."""

RETRY_AFTER_S = 1.0


class _Taken(NamedTuple):
    """The last file that was taken in at a place, and the version of its block then."""

    sha256: bytes
    version: int


class VerdictChecker:
    """Whether the evaluators that the run's `owner` names now vouch for a file.

    `peers` are those that are live now; no verdict counts that is older than `since_s`, when this host began, in
    seconds since 1970 as `clock` counts them.
    """

    def __init__(
        self,
        owner: str,
        peers: Callable[[], Sequence[PeerInfo]],
        since_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._owner, self._peers, self._since_s, self._clock = owner, peers, since_s, clock

    def versions_tested(self, messages: Sequence[pb.SignedVerdict], offered: Offered) -> tuple[int, ...]:
        """Versions of the block that the file was held against. Raises KilohiveError unless every verdict holds."""
        evaluators = evaluators_named(self._peers(), self._owner)
        needed = needed_verdicts(len(evaluators))
        if not needed:
            raise UnavailableError("the run's owner names no evaluators now: nothing is taken in")
        if len(messages) != needed:
            raise InvalidInputError("verdicts", f"are {len(messages)}, must be {needed}")
        versions: dict[str, int] = {}
        for message in messages:
            signer, verdict = open_verdict(message)
            if signer not in evaluators or signer in versions:
                raise InvalidInputError("verdicts", f"of {signer} do not count, or not twice")
            check_verdict(verdict, offered, self._clock(), self._since_s)
            versions[signer] = verdict.version
        return tuple(versions.values())


class ExpertUploadService:
    """TakeIn over one host's blocks."""

    def __init__(
        self,
        manifest: Manifest,
        runtime: Runtime,
        verdict_checker: VerdictChecker,
        rate_limits: RateLimits,
        events: EventLog,
    ) -> None:
        self._manifest, self._runtime, self._verdict_checker = manifest, runtime, verdict_checker
        self._rate_limits, self._events = rate_limits, events
        self._taken: dict[ExpertId, _Taken] = {}
        self._uploads = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "TakeIn": grpc.stream_unary_rpc_method_handler(upload_handler(self._take_in, "TakeIn"))
        }
        return grpc.method_handlers_generic_handler(INTAKE, methods)

    async def _take_in(self, stream: ServerStream, context: Context) -> pb.TakeInResponse:
        async with within(min(timeout_s(context), UPLOAD_S), "the expert"):
            inbox = Inbox(stream, self._rate_limits)
            begin = await receive_begin(inbox)
            place = ExpertId(begin.layer, begin.expert)
            offered = offered_in(begin, self._manifest)
            tested = self._verdict_checker.versions_tested(begin.verdicts, offered)
            if (before := self._taken_before(offered, tested)) is not None:
                return pb.TakeInResponse(version=before)
            self._check_versions(place, tested)
            weights = await self._received(inbox, begin)
            replaced = self._runtime.call(lambda: self._replace(offered, weights, tested))
            now = await asyncio.wrap_future(replaced)
        self._events.emit(TakenInEvent(layer=place.layer, expert=place.expert, version=now, tested=min(tested)))
        logger.info("Took %s in; its block is at version %d", place, now)
        return pb.TakeInResponse(version=now)

    async def _received(self, inbox: Inbox, begin: pb.OfferBegin) -> Weights:
        if self._uploads >= MAX_UPLOADS:
            raise OverloadedError("this host takes another expert in", RETRY_AFTER_S)
        self._uploads += 1
        try:
            data = await receive_file(inbox, begin)
            return await asyncio.to_thread(read_expert, data, self._manifest)
        finally:
            self._uploads -= 1

    def _taken_before(self, offered: Offered, tested: tuple[int, ...]) -> int | None:
        """The block's version once the same file was taken in on the same word: it may be sent twice, and acts once."""
        taken = self._taken.get(ExpertId(offered.layer, offered.expert))
        again = taken is not None and taken.sha256 == offered.sha256 and max(tested) < taken.version
        return taken.version if taken is not None and again else None

    def _check_versions(self, place: ExpertId, tested: tuple[int, ...]) -> None:
        """Raise InvalidInputError if the block is not what the file was held against any more. Safe in any thread."""
        block_id = place.block(self._manifest.model)
        block = self._runtime.blocks.get(block_id)
        if block is None:
            raise not_hosted(block_id)
        taken = self._taken.get(place)
        limit = steps_between(self._manifest.averaging.max_staleness, block.version)
        for version in tested:
            if taken is not None and version < taken.version:
                raise InvalidInputError("verdict.version", f"is {version}: another expert was taken in since")
            if limit is not None and abs(block.version - version) > limit:
                problem = f"is {version}, {block_id} is at {block.version}: stale, at most {limit} steps may part them"
                raise InvalidInputError("verdict.version", problem)

    def _replace(self, offered: Offered, weights: Weights, tested: tuple[int, ...]) -> int:
        """Replace the expert, on the thread that owns the weights: it may have stepped meanwhile."""
        place = ExpertId(offered.layer, offered.expert)
        self._check_versions(place, tested)
        block = self._runtime.blocks[place.block(self._manifest.model)]
        block.replace(place.row(self._manifest.model), weights, max(tested))
        self._taken[place] = _Taken(offered.sha256, block.version)
        return block.version

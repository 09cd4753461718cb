"""A file that a run names by its hash, from the trainers that have it.

It comes piece by piece and goes on with another trainer where one breaks off. Nothing is believed until the whole has
the hash: where it has not, and more than one trainer sent of it, the last one is asked for all of it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import grpc

from common.assets import asset_of
from common.errors import InvalidInputError, KilohiveError, UnavailableError
from common.text import peer_words, short_id
from node.rpc.call_errors import rebuilt_error
from node.rpc.channels import OPEN_TIMEOUT_S
from node.trainer.asset_service import SERVICE_NAME
from protocol import assets_pb2 as pb
from protocol.limits import MAX_PIECE_BYTES
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from common.assets import Asset
    from node.rpc.security import Caller
    from protocol.endpoints import Address

logger = logging.getLogger(__name__)

PATH = f"/{SERVICE_NAME}/Read"
MAX_WHY_CHARS = 200
PIECE_TIMEOUT_S = 30.0
"""For a piece of 1 MiB: what a line of 300 kbit/s needs."""


class AssetFetch:
    """One file on its way. `tell` is called with the bytes that are here."""

    def __init__(self, caller: Caller, run_id: str, asset: Asset, tell: Callable[[int], None]) -> None:
        self._caller, self._run_id, self._asset, self._tell = caller, run_id, asset, tell
        self._taken = bytearray()

    async def fetch(self, sources: Iterable[Address]) -> bytes:
        """The file. What came stays for the next call. Raises UnavailableError if none of `sources` has it."""
        problem = "there is no trainer"
        for source in sources:
            try:
                return await self._from(source)
            except KilohiveError as error:
                problem = f"{short_id(source.peer_id)}: {peer_words(str(error), MAX_WHY_CHARS)}"
                logger.info("The file %s does not come from %s", self._asset, problem)
        raise UnavailableError(f"no trainer sends the file {self._asset}; the last answer: {problem}")

    async def _from(self, source: Address) -> bytes:
        began_with = len(self._taken)
        data = await self._rest_from(source)
        if asset_of(data) != self._asset and began_with:
            data = await self._rest_from(source)
        if asset_of(data) != self._asset:
            raise InvalidInputError("sha256", "is not that of what was sent")
        return data

    async def _rest_from(self, source: Address) -> bytes:
        """What is here and all that is missing; nothing is here any more after that."""
        async with await self._caller.open(source, OPEN_TIMEOUT_S) as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(PATH)
            while len(self._taken) < self._asset.n_bytes:
                request = pb.AssetRequest(
                    run_id=self._run_id, sha256=bytes.fromhex(self._asset.sha256), offset=len(self._taken)
                )
                try:
                    raw: bytes = await call(
                        request.SerializeToString(),
                        timeout=PIECE_TIMEOUT_S,
                        metadata=self._caller.metadata(source, PATH),
                    )
                except grpc.aio.AioRpcError as error:
                    raise rebuilt_error(error.code(), error.details(), error.trailing_metadata()) from None
                self._take(parse_message(pb.AssetPiece, raw, "piece").data)
        data = bytes(self._taken)
        self._taken.clear()
        return data

    def _take(self, piece: bytes) -> None:
        most = min(MAX_PIECE_BYTES, self._asset.n_bytes - len(self._taken))
        if not 0 < len(piece) <= most:
            raise InvalidInputError("piece", f"has {len(piece)} bytes, must have 1 to {most}")
        self._taken += piece
        self._tell(len(self._taken))

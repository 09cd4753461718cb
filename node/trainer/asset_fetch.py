"""A file that a run names by its hash, from the trainers that have it.

It comes piece by piece and goes on with another trainer where one breaks off. Nothing is believed until the whole has
the hash: where it has not, and more than one trainer sent of it, the last one is asked for all of it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import grpc

from common.errors import DataError, InvalidInputError, KilohiveError, UnavailableError
from common.text import peer_words, short_id
from node.trainer.asset_service import SERVICE_NAME
from protocol import assets_pb2 as pb
from protocol.call_errors import rebuilt_error
from protocol.channels import OPEN_TIMEOUT_S
from protocol.limits import MAX_PIECE_BYTES
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from common.assets import Asset, AssetStore
    from protocol.endpoints import Address
    from protocol.security import Caller

logger = logging.getLogger(__name__)

PATH = f"/{SERVICE_NAME}/Read"
MAX_WHY_CHARS = 200
PIECE_TIMEOUT_S = 30.0
"""For a piece of 1 MiB: what a line of 300 kbit/s needs."""


class AssetFetch:
    """One file on its way. `tell` is called with the bytes that are here."""

    def __init__(
        self, caller: Caller, run_id: str, asset: Asset, store: AssetStore, tell: Callable[[int], None]
    ) -> None:
        self._caller, self._run_id, self._asset, self._store, self._tell = caller, run_id, asset, store, tell
        self._part = store.part(asset)

    async def fetch(self, sources: Iterable[Address]) -> None:
        """Have the file in the store. What came stays there for the next call, also one of another process.

        Raises UnavailableError if none of `sources` has it, DataError if it cannot be written.
        """
        problem = "there is no trainer"
        for source in sources:
            try:
                return await self._from(source)
            except DataError:
                raise
            except KilohiveError as error:
                problem = f"{short_id(source.peer_id)}: {peer_words(str(error), MAX_WHY_CHARS)}"
                logger.info("The file %s does not come from %s", self._asset, problem)
        raise UnavailableError(f"no trainer sends the file {self._asset}; the last answer: {problem}")

    async def _from(self, source: Address) -> None:
        began_with = self._n_taken()
        await self._rest_from(source)
        if await asyncio.to_thread(self._store.adopt, self._asset):
            return
        if began_with:
            await self._rest_from(source)
            if await asyncio.to_thread(self._store.adopt, self._asset):
                return
        raise InvalidInputError("sha256", "is not that of what was sent")

    async def _rest_from(self, source: Address) -> None:
        async with await self._caller.open(source, OPEN_TIMEOUT_S) as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(PATH)
            while (n_taken := self._n_taken()) < self._asset.n_bytes:
                request = pb.AssetRequest(run_id=self._run_id, sha256=bytes.fromhex(self._asset.sha256), offset=n_taken)
                try:
                    raw: bytes = await call(
                        request.SerializeToString(),
                        timeout=PIECE_TIMEOUT_S,
                        metadata=self._caller.metadata(source, PATH),
                    )
                except grpc.aio.AioRpcError as error:
                    raise rebuilt_error(error.code(), error.details(), error.trailing_metadata()) from None
                piece = parse_message(pb.AssetPiece, raw, "piece").data
                most = min(MAX_PIECE_BYTES, self._asset.n_bytes - n_taken)
                if not 0 < len(piece) <= most:
                    raise InvalidInputError("piece", f"has {len(piece)} bytes, must have 1 to {most}")
                await asyncio.to_thread(self._store.gather, self._asset, piece)
                self._tell(n_taken + len(piece))

    def _n_taken(self) -> int:
        """Bytes that are here; too many of them, of whatever, count as none."""
        n_bytes = self._part.stat().st_size if self._part.exists() else 0
        if n_bytes > self._asset.n_bytes:
            self._part.unlink()
            return 0
        return n_bytes

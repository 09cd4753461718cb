"""The gRPC service with which a trainer hands out the files that its run's manifest names. On the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from common.errors import InvalidInputError, UnavailableError, UnknownRunError
from node.rpc.handlers import CallCounts, unary
from protocol import assets_pb2 as pb
from protocol.limits import MAX_PIECE_BYTES

if TYPE_CHECKING:
    from common.assets import AssetStore
    from protocol.manifest import Manifest

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Assets"].full_name


class AssetService:
    """Read over what `store` keeps, of the manifest's assets alone."""

    def __init__(self, manifest: Manifest, store: AssetStore) -> None:
        self._run_id, self._store = manifest.run_id, store
        self._assets = {bytes.fromhex(asset.sha256): asset for asset in manifest.assets}

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
            unary(pb.AssetRequest, self.read, CallCounts())
        )
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"Read": method})

    async def read(self, request: pb.AssetRequest, _timeout_s: float) -> pb.AssetPiece:
        """The piece that is asked for.

        Raises:
            UnknownRunError: it is of another run.
            InvalidInputError: the manifest names no such file, or the file has no such byte.
            UnavailableError: the file is not here any more.
        """
        if request.run_id != self._run_id:
            raise UnknownRunError("run_id", f"is {request.run_id[:60]!r}, this trainer's is {self._run_id!r}")
        asset = self._assets.get(request.sha256)
        if asset is None:
            raise InvalidInputError("sha256", "is of no file that this run's manifest names")
        if request.offset >= asset.n_bytes:
            raise InvalidInputError("offset", f"is {request.offset}, the file has {asset.n_bytes} bytes")
        data = await asyncio.to_thread(self._store.read, asset, request.offset, MAX_PIECE_BYTES)
        if not data:
            raise UnavailableError(f"this trainer has lost the file {asset}")
        return pb.AssetPiece(data=data)

"""libp2p's streams as the rest of the lighthouse uses them: plain reads and writes, one kind of error."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import trio
from libp2p.exceptions import BaseLibp2pError

from common.errors import UnavailableError
from dht.addresses import tcp_address

if TYPE_CHECKING:
    from collections.abc import Iterator

CLOSE_TIMEOUT_S = 2.0

LIBP2P_ERRORS = (
    BaseLibp2pError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    OSError,
    EOFError,
    LookupError,  # of peers that it does not know
    ValueError,  # of names of protocols that are not UTF-8, among others
)
"""What a call into libp2p raises when the other side, or the way to it, is at fault."""


class TrioStream:
    """One of libp2p's streams, with the peer at its other end. Made for streams that are open."""

    def __init__(self, stream: Any) -> None:  # noqa: ANN401 - libp2p is not on every machine that checks types
        self._stream = stream
        self.peer: bytes = stream.muxed_conn.peer_id.to_bytes()
        self.peer_id = str(stream.muxed_conn.peer_id)

    @property
    def address(self) -> str:
        """The address from which the peer is connected; empty if that is not known."""
        where = self._stream.muxed_conn.get_remote_address()
        return str(where[0]) if where else ""

    @property
    def seen_at(self) -> str:
        """The peer's address as a multiaddress with its port; empty if that is not known."""
        where = self._stream.muxed_conn.get_remote_address()
        return tcp_address(str(where[0]), int(where[1])) if where else ""

    async def read(self, n_bytes: int) -> bytes:
        """Read at most `n_bytes` bytes; none at the end. Raises UnavailableError."""
        with one_error("read"):
            try:
                return bytes(await self._stream.read(n_bytes))
            except EOFError:
                return b""

    async def read_exactly(self, n_bytes: int) -> bytes:
        """Read exactly `n_bytes` bytes, or raise UnavailableError at the stream's end. The caller bounds the time."""
        found = b""
        while len(found) < n_bytes:
            piece = await self.read(n_bytes - len(found))
            if not piece:
                raise UnavailableError(f"libp2p: read: the stream ends {n_bytes - len(found)} bytes early")
            found += piece
        return found

    async def write(self, data: bytes) -> None:
        """All of `data`; raises UnavailableError."""
        with one_error("write"):
            await self._stream.write(data)

    def capacity(self) -> int:
        """Bytes that the other side has room for now; raises UnavailableError when it takes no more."""
        muxed = self._stream.muxed_stream
        if muxed.closed or muxed.send_closed:
            raise UnavailableError("libp2p: write: the stream is closed")
        return int(muxed.send_window)

    async def end(self) -> None:
        """Say that nothing more will be written."""
        with one_error("end"), trio.move_on_after(CLOSE_TIMEOUT_S):
            await self._stream.close_write()

    async def close(self) -> None:
        """End it in good order, or cut it off. Never fails, and never waits for long."""
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True), contextlib.suppress(*LIBP2P_ERRORS):
            await self._stream.close()

    async def reset(self) -> None:
        """Cut it off. Never fails, and never waits for long."""
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True), contextlib.suppress(*LIBP2P_ERRORS):
            await self._stream.reset()


@contextlib.contextmanager
def one_error(what: str) -> Iterator[None]:
    """Raise UnavailableError for whatever libp2p raises."""
    try:
        yield
    except LIBP2P_ERRORS as error:
        raise UnavailableError(f"libp2p: {what}: {error or type(error).__name__}") from error

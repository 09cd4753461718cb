"""Streams of bytes between peers, over whatever connection p2pd has with them.

Calls travel in them where no port can be dialled. p2pd encrypts them and proves the peer at the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from google.protobuf.message import Message
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from common.errors import IdentityError, KilohiveError, UnavailableError
from common.tasks import until_one_ends
from common.text import last_line
from dht.framing import LENGTH_BYTES, PIECE_BYTES, SEND_TIMEOUT_S, length_in, packed
from protocol.identity import public_key_of
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from dht.transport import Transport

    Handler = Callable[["Stream"], Awaitable[None]]

M = TypeVar("M", bound=Message)
T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_STREAMS = 256
"""That others hold open to this node at once."""

MAX_STREAMS_PER_PEER = 64
CLOSE_TIMEOUT_S = 1.0


class Stream(NamedTuple):
    """One stream and who is at its other end, proven."""

    peer_id: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, message: Message) -> None:
        """Send one message; raises UnavailableError when the stream has ended or does not take it in time."""
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                self.writer.write(packed(message))
                await self.writer.drain()
        except OSError as error:  # TimeoutError is one
            raise UnavailableError(f"the stream to {self.peer_id} has ended: {error}") from None

    async def receive(self, kind: type[M], timeout_s: float) -> M:
        """The next message.

        Raises:
            UnavailableError: the stream has ended, or nothing came for so long.
            InvalidInputError: it is too long or is none of `kind`; nothing was read for it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                length = length_in(await self.reader.readexactly(LENGTH_BYTES))
                return parse_message(kind, await self.reader.readexactly(length))
        except TimeoutError:
            raise UnavailableError(f"{self.peer_id} said nothing for {timeout_s:g} s") from None
        except (OSError, EOFError):
            raise UnavailableError(f"the stream to {self.peer_id} has ended") from None

    async def last(self, message: Message) -> None:
        """Send what nothing follows, and leave the closing to the other end; raises like `send`.

        p2pd drops what is sent just before a close.
        """
        await self.send(message)
        with contextlib.suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self.reader.read(1)

    def close(self) -> None:
        """Let go of it; what was sent just before may be lost."""
        self.writer.close()


class Streams:
    """One node's streams. Belongs to the event loop."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._serving: set[asyncio.Task[None]] = set()
        self._by_peer: Counter[str] = Counter()

    async def serve(self, protocol: str, handler: Handler, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Let peers open streams of `protocol`; each is the handler's until that returns. Raises UnavailableError."""

        async def opened(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # noqa: ANN401
            stream = Stream(info.peer_id.to_base58(), reader, writer)
            # Not awaited by hivemind in a way that could be cancelled: `close` ends it.
            serving = asyncio.create_task(self._serve(stream, handler), name=f"stream {protocol}")
            self._serving.add(serving)
            serving.add_done_callback(self._serving.discard)

        await self._within(timeout_s, self._transport.add_binary_stream_handler(protocol, opened))

    async def open(self, peer_id: str, protocol: str, timeout_s: float) -> Stream:
        """A stream to a peer's handler; p2pd dials the peer if there is no connection. Raises UnavailableError."""
        opening = self._transport.open_stream(_parsed(peer_id), protocol)
        return Stream(peer_id, *await self._within(timeout_s, opening))

    async def seen_at(self, peer_id: str, timeout_s: float) -> tuple[str, ...]:
        """Multiaddresses of this node's connections with a peer; none if there is none. Raises UnavailableError."""
        return (await self._within(timeout_s, self._transport.connections())).get(peer_id, ())

    async def dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Connect to a peer at one of its multiaddresses, unless there is a connection. Raises UnavailableError."""
        try:
            targets = [Multiaddr(address) for address in addresses]
        except (ValueError, TypeError, LookupError):
            raise UnavailableError(f"peer {peer_id!r:.80}: {list(addresses)!r:.200} cannot be dialled") from None
        await self._within(timeout_s, self._transport.dial(_parsed(peer_id), *targets))

    async def hang_up(self, peer_id: str, timeout_s: float) -> None:
        """Close the connections with a peer, and every stream over them. Raises UnavailableError."""
        await self._within(timeout_s, self._transport.hang_up(_parsed(peer_id)))

    async def close(self) -> None:
        """End every stream that a peer has opened; safe to call twice."""
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving, timeout=CLOSE_TIMEOUT_S)

    async def _within(self, timeout_s: float, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except TimeoutError:
            raise UnavailableError(f"p2pd: no answer in {timeout_s:g} s") from None
        except (P2PDaemonError, OSError, EOFError) as error:
            raise UnavailableError(f"p2pd: {last_line(str(error))[:200] or type(error).__name__}") from None

    async def _serve(self, stream: Stream, handler: Handler) -> None:
        if len(self._serving) > MAX_STREAMS or self._by_peer[stream.peer_id] >= MAX_STREAMS_PER_PEER:
            stream.close()
            return
        self._by_peer[stream.peer_id] += 1
        try:
            await handler(stream)
        except KilohiveError as error:
            logger.debug("A stream from %s ended: %s", stream.peer_id, error)
        except Exception:  # task boundary: a bug of ours must not end the node
            logger.exception("A stream from %s failed", stream.peer_id)
        finally:
            self._by_peer[stream.peer_id] -= 1
            if not self._by_peer[stream.peer_id]:
                del self._by_peer[stream.peer_id]
            stream.close()


async def splice(one: Stream, other: Stream, idle_s: float, moved: Callable[[int], None] | None = None) -> None:
    """Carry bytes both ways until a side ends or nothing has moved for `idle_s`; closes both. `moved` counts bytes."""
    tell = moved or (lambda _: None)
    try:
        await until_one_ends(_carry(one, other, idle_s, tell), _carry(other, one, idle_s, tell))
    finally:
        one.close()
        other.close()


async def _carry(source: Stream, target: Stream, idle_s: float, moved: Callable[[int], None]) -> None:
    while True:
        try:
            async with asyncio.timeout(idle_s):
                piece = await source.reader.read(PIECE_BYTES)
                if not piece:
                    return
                target.writer.write(piece)
                await target.writer.drain()
        except (OSError, TimeoutError):
            return
        moved(len(piece))


def _parsed(peer_id: str) -> PeerID:
    try:
        public_key_of(peer_id)
    except IdentityError as error:
        raise UnavailableError(f"{peer_id!r:.80} is no peer id ({error})") from None
    return PeerID.from_base58(peer_id)

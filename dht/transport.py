"""hivemind's view of p2pd: calls to and from peers, each cleaned, all of them ended at once when the node stops."""
# ruff: noqa: ANN401, SLF001 - hivemind has no types, and only private fields tell which of its calls wait for p2pd

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from dht.answers import clean_request, clean_response, is_known

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hivemind.dht.routing import RoutingTable

    from dht.daemon import Daemon
    from dht.packing import RecordChecker

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0


class Transport(P2P):  # type: ignore[misc]  # hivemind has no types
    """A P2P connected to a daemon of ours. Uses fields of P2P and its control client that hivemind 1.1.12 has."""

    _checker: RecordChecker
    _routing_table: RoutingTable | None = None
    _closed = False

    @classmethod
    async def connect_to(cls, daemon: Daemon, checker: RecordChecker) -> Transport:
        """Take control of a running p2pd."""
        transport: Transport = await cls.replicate(Multiaddr(daemon.control_socket))
        transport._checker = checker
        # When p2pd ends, whoever waits for an answer through it learns so at once.
        transport._client.control._read_task.add_done_callback(lambda _: transport._fail_pending_calls())
        return transport

    def attach(self, routing_table: RoutingTable) -> None:
        """Set the table of those that this node need not be told of."""
        self._routing_table = routing_table

    async def dial(self, peer_id: PeerID, *addresses: Multiaddr) -> None:
        """Connect to a peer at its addresses; raises hivemind's ControlFailure, or OSError or EOFError without p2pd."""
        connect = p2pd_pb2.ConnectRequest(peer=peer_id.to_bytes(), addrs=[address.to_bytes() for address in addresses])
        await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect))

    async def hang_up(self, peer_id: PeerID) -> None:
        """Close the connections to a peer; raises like `dial`."""
        disconnect = p2pd_pb2.DisconnectRequest(peer=peer_id.to_bytes())
        await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.DISCONNECT, disconnect=disconnect))

    async def connections(self) -> dict[str, tuple[str, ...]]:
        """Peers that p2pd has a connection with, and where each is seen; raises like `dial`."""
        response = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return {
            PeerID(peer.id).to_base58(): tuple(str(Multiaddr(address)) for address in peer.addrs)
            for peer in response.peers
        }

    async def open_stream(self, peer_id: PeerID, protocol: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream of bytes to a peer's handler of `protocol`; raises like `dial`."""
        reader, writer = await self._client.control.daemon_connector.open_connection()
        request = p2pd_pb2.StreamOpenRequest(peer=peer_id.to_bytes(), proto=[protocol])
        try:
            await _asked(reader, writer, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=request))
        except BaseException:  # cancelled, too: no socket stays
            writer.close()
            raise
        return reader, writer

    async def _ask(self, request: Any) -> Any:
        reader, writer = await self._client.control.daemon_connector.open_connection()
        try:
            return await _asked(reader, writer, request)
        finally:
            writer.close()

    async def call_protobuf_handler(self, peer_id: PeerID, name: str, input: Any, output_protobuf_type: Any) -> Any:  # noqa: A002
        """The one way out: call a peer's handler."""
        if self._closed:
            raise P2PDaemonError("this node is stopping")
        response = await super().call_protobuf_handler(peer_id, name, input, output_protobuf_type)
        clean_response(input, response, peer_id, self._knows, self._checker)
        return response

    async def add_protobuf_handler(
        self,
        name: str,
        handler: Callable[[Any, P2PContext], Awaitable[Any]],
        input_protobuf_type: Any,
        *,
        stream_input: bool = False,
        stream_output: bool = False,
        balanced: bool = False,
    ) -> None:
        """The one way in: let peers call a handler."""

        async def guarded(request: Any, context: P2PContext) -> Any:
            clean_request(request, context.remote_id, self._checker)
            return await handler(request, context)

        await super().add_protobuf_handler(
            name,
            guarded,
            input_protobuf_type,
            stream_input=stream_input,
            stream_output=stream_output,
            balanced=balanced,
        )

    async def close(self) -> None:
        """End every call, in and out, and let go of p2pd. Safe to call twice."""
        self._closed = True
        control = self._client.control
        self._fail_pending_calls()
        ending = {control._read_task, control._write_task, *control._handler_tasks.values()}
        for task in ending:
            task.cancel()
        await self.shutdown()
        await asyncio.wait(ending, timeout=CLOSE_TIMEOUT_S)

    def _knows(self, place: int) -> bool:
        return self._routing_table is not None and is_known(self._routing_table, place)

    def _fail_pending_calls(self) -> None:
        for call in list(self._client.control._pending_calls.values()):
            if not call.done():
                call.set_exception(P2PDaemonError("the connection to p2pd has ended"))


async def _asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> Any:
    await write_pbmsg(writer, request)
    response = p2pd_pb2.Response()
    await read_pbmsg_safe(reader, response)
    raise_if_failed(response)
    return response

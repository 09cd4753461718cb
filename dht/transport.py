"""hivemind's view of p2pd: calls to and from peers, each cleaned, all of them ended at once when the node stops."""
# ruff: noqa: ANN401, SLF001 - hivemind has no types, and only private fields tell which of its calls wait for p2pd

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from hivemind.dht import protocol as hivemind_protocol
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient, P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from common.clock import SteadyClock
from dht.answers import clean_request, clean_response, is_known

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hivemind.dht.routing import RoutingTable

    from dht.daemon import Daemon
    from dht.packing import RecordChecker

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0
MAX_CLOCKS = 256
"""Peers whose time is remembered."""


class Transport(P2P):  # type: ignore[misc]  # hivemind has no types
    """A P2P connected to a daemon of ours. Uses fields of P2P and its control client that hivemind 1.1.12 has."""

    _routing_table: RoutingTable | None = None
    _closed = False
    _listen_task: asyncio.Task[None] | None

    def __init__(self, checker: RecordChecker, clock: Callable[[], float]) -> None:
        super().__init__()
        self._checker, self._clock = checker, clock
        self._ahead_s: OrderedDict[PeerID, float] = OrderedDict()
        self._unary_handlers: dict[str, Any] = {}
        self._stream_handlers: dict[str, Any] = {}

    @classmethod
    async def connect_to(cls, daemon: Daemon, checker: RecordChecker, clock: Callable[[], float]) -> Transport:
        """Take control of a running p2pd; `clock` is what peers are told when they ask for the time."""
        transport = cls(checker, clock)
        await transport.take_over(daemon)
        return transport

    async def take_over(self, daemon: Daemon) -> None:
        """Take control of a running p2pd, which from now on serves what the one before it served.

        Raises P2PDaemonError, OSError or EOFError when it ends meanwhile; then it can be called again with another.
        """
        await self._let_go()
        self._daemon_listen_maddr = Multiaddr(daemon.control_socket)
        self._client_listen_maddr = Multiaddr(daemon.client_socket)
        self._client = await Client.create(self._daemon_listen_maddr, self._client_listen_maddr)
        self._alive = True
        control = self._client.control
        # When p2pd ends, whoever waits for an answer through it learns so at once.
        control._read_task.add_done_callback(lambda task: _connection_ended(control, task))
        await self._ping_daemon()
        for name, unary in self._unary_handlers.items():
            await control.add_unary_handler(name, unary)
        for name, stream in self._stream_handlers.items():
            await self.add_binary_stream_handler(name, stream)

    async def _let_go(self) -> None:
        """End what is left of the connection to a p2pd that has died, and keep what it served."""
        if self._client is None:
            return
        control = self._client.control
        self._unary_handlers |= control.unary_handlers
        self._stream_handlers |= control.handlers
        _fail_pending_calls(control)
        listening = {self._listen_task} if self._listen_task is not None else set()
        self._listen_task = None
        await _end({control._read_task, control._write_task, *control._handler_tasks.values(), *listening})

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
        if self._client.control._read_task.done():  # nobody would ever answer
            raise P2PDaemonError("the connection to p2pd has ended")
        response = await super().call_protobuf_handler(peer_id, name, input, output_protobuf_type)
        clean_response(input, response, peer_id, self._knows, self._checker)
        if isinstance(response, dht_pb2.PingResponse):
            self._compare_clocks(peer_id, response)
        return response

    def ahead_s(self, peer_id: PeerID) -> float | None:
        """How far a peer's clock was ahead of this node's when the peer last said what time it is."""
        return self._ahead_s.get(peer_id)

    def forget_clocks(self) -> None:
        """Drop what `ahead_s` tells: this node's clock was set."""
        self._ahead_s.clear()

    def _compare_clocks(self, peer_id: PeerID, response: Any) -> None:
        """Keep how far the peer's clock is ahead, and have hivemind, which compares it too, do so with this clock."""
        if not response.dht_time:
            return
        own_s = self._clock()
        self._ahead_s[peer_id] = response.dht_time - own_s
        self._ahead_s.move_to_end(peer_id)
        if len(self._ahead_s) > MAX_CLOCKS:
            self._ahead_s.popitem(last=False)
        response.dht_time += hivemind_protocol.get_dht_time() - own_s

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
            answer = await handler(request, context)
            if isinstance(answer, dht_pb2.PingResponse):
                answer.dht_time = told(self._clock)
            return answer

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
        await self._let_go()
        await self.shutdown()

    def _knows(self, place: int) -> bool:
        return self._routing_table is not None and is_known(self._routing_table, place)


def told(clock: Callable[[], float]) -> float:
    """The time that a peer is told who asks for it."""
    return clock.told() if isinstance(clock, SteadyClock) else clock()


def _connection_ended(control: ControlClient, reading: asyncio.Task[None]) -> None:
    if not reading.cancelled():
        reading.exception()  # marks it as seen
    _fail_pending_calls(control)


def _fail_pending_calls(control: ControlClient) -> None:
    for call in list(control._pending_calls.values()):
        if not call.done():
            call.set_exception(P2PDaemonError("the connection to p2pd has ended"))


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)


async def _asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> Any:
    await write_pbmsg(writer, request)
    response = p2pd_pb2.Response()
    await read_pbmsg_safe(reader, response)
    raise_if_failed(response)
    return response

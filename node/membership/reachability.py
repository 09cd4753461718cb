"""Can others call this node? It asks two of them to dial it back, and says what they found.

A node that nobody can call looks fine from inside: it holds blocks, averages with those that it dials, and answers
nobody. So it asks, and tells its owner and, in its record, everybody.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import urllib.parse
from typing import TYPE_CHECKING

import grpc

from common.errors import InvalidInputError, KilohiveError, OverloadedError, UnavailableError
from common.text import peer_words
from node.membership.events import ReachabilityEvent
from node.rpc.handlers import CallCounts, unary_in_context
from protocol import reach_pb2 as pb
from protocol.call_errors import rebuilt_error
from protocol.call_signature import caller_of
from protocol.endpoints import Address, is_loopback, is_relayed
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from common.events import EventLog
    from dht.view import PeerInfo
    from protocol.announcements import Reachability
    from protocol.security import Caller

    Context = grpc.aio.ServicerContext[bytes, bytes]

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Reach"].full_name
DIAL_BACK = f"/{SERVICE_NAME}/DialBack"
ASKED = 2
DIAL_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 2 * DIAL_TIMEOUT_S
MAX_DIALLING = 4
"""Dial-backs at once."""

MAX_PORT = 65_535


class DialBackService:
    """Dials those who ask for it, at the address that their call came from and nowhere else.

    `own_host` is the address that this node listens on: what seems to come from there came through its tunnel.
    """

    def __init__(self, caller: Caller, own_host: str) -> None:
        self._caller, self._own_host, self._dialling = caller, own_host, 0

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "DialBack": grpc.unary_unary_rpc_method_handler(
                unary_in_context(pb.DialBackRequest, self._answer, CallCounts())
            )
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def _answer(self, request: pb.DialBackRequest, context: Context) -> pb.DialBackResponse:
        peer_id = caller_of(context.invocation_metadata() or ()) or ""
        return await self._dial_back(request, peer_id, observed_host(context.peer()))

    async def _dial_back(self, request: pb.DialBackRequest, peer_id: str, host: str) -> pb.DialBackResponse:
        if not 1 <= request.port <= MAX_PORT:
            raise InvalidInputError("port", f"must be from 1 to {MAX_PORT}, is {request.port}")
        if same_host(host, self._own_host) and not is_loopback(host):
            raise UnavailableError("this call came through a tunnel: who made it cannot be dialled back")
        if self._dialling >= MAX_DIALLING:
            raise OverloadedError(f"this node already dials {MAX_DIALLING} others back")
        self._dialling += 1
        try:
            await self._reach(Address(peer_id, f"{host}:{request.port}"))
        except KilohiveError as error:
            return pb.DialBackResponse(observed=host, reached=False, problem=str(error))
        finally:
            self._dialling -= 1
        return pb.DialBackResponse(observed=host, reached=True)

    async def _reach(self, address: Address) -> None:
        channel = await self._caller.open(address, DIAL_TIMEOUT_S)
        try:
            await asyncio.wait_for(channel.channel_ready(), DIAL_TIMEOUT_S)
        except TimeoutError:
            raise UnavailableError(f"{address.endpoint} does not answer") from None
        finally:
            await channel.close()


class ReachabilityWatch:
    """Asks others whether they can call this node. `state` is what they said last."""

    def __init__(
        self, caller: Caller, peers: Callable[[], Sequence[PeerInfo]], own_id: str, events: EventLog, seed: int = 0
    ) -> None:
        self._caller, self._peers, self._own_id, self._events = caller, peers, own_id, events
        self._random = random.Random(f"{seed}/{own_id}")
        self.state: Reachability = "unknown"

    async def look(self, endpoint: str, hosts: Collection[str] = ()) -> None:
        """Ask up to ASKED others once, and tell what is new; `hosts` are the addresses of a name in `endpoint`."""
        others = [
            peer
            for peer in self._peers()
            if peer.endpoint and not is_relayed(peer.endpoint) and peer.peer_id != self._own_id
        ]
        asked = self._random.sample(others, min(ASKED, len(others)))
        answers = await asyncio.gather(*(self._ask(peer, endpoint) for peer in asked))
        heard = [answer for answer in answers if answer is not None]
        if heard:
            self._conclude(endpoint, verdict(heard, endpoint, hosts), heard)

    def look_at_itself(self, endpoint: str, others: Iterable[str], hosts: Collection[str] = ()) -> bool:
        """Whether nobody need be asked: `endpoint` is an address of a home's network, and `others` are not in it."""
        host = endpoint.rpartition(":")[0]
        if not all(map(_is_private, hosts or (host,))) or all(map(_is_private, others)):
            return False
        self._conclude(endpoint, "not reached", [pb.DialBackResponse(observed="another address", problem="private")])
        return True

    def _conclude(self, endpoint: str, state: Reachability, heard: Sequence[pb.DialBackResponse]) -> None:
        before, self.state = self.state, state
        if state != before:
            self._tell(endpoint, heard)

    async def _ask(self, peer: PeerInfo, endpoint: str) -> pb.DialBackResponse | None:
        """None from one that does not answer: that says nothing about this node."""
        address = Address(peer.peer_id, peer.endpoint)
        request = pb.DialBackRequest(port=int(endpoint.rpartition(":")[2]))
        try:
            async with await self._caller.open(address, DIAL_TIMEOUT_S) as channel:
                call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(DIAL_BACK)
                metadata = self._caller.metadata(address, DIAL_BACK)
                raw: bytes = await call(request.SerializeToString(), timeout=ASK_TIMEOUT_S, metadata=metadata)
            return parse_message(pb.DialBackResponse, raw)
        except grpc.aio.AioRpcError as error:
            problem: KilohiveError = rebuilt_error(error.code(), error.details(), error.trailing_metadata())
        except KilohiveError as error:
            problem = error
        logger.debug("Peer %s did not dial back: %s", peer.peer_id, problem)
        return None

    def _tell(self, endpoint: str, heard: Sequence[pb.DialBackResponse]) -> None:
        observed = ", ".join(sorted({peer_words(answer.observed) for answer in heard}))
        problem = peer_words(next((answer.problem for answer in heard if answer.problem), ""))
        self._events.emit(
            ReachabilityEvent(state=self.state, endpoint=endpoint, observed=observed, asked=len(heard), problem=problem)
        )
        if self.state == "reached":
            logger.info("Others can call this node at %s", endpoint)
        else:
            logger.warning("%s", how_to_be_reached(endpoint, observed, problem))


def verdict(heard: Sequence[pb.DialBackResponse], endpoint: str, hosts: Collection[str] = ()) -> Reachability:
    """What the answers (one or more) come to: one that got through at the announced address is enough.

    `hosts` are the addresses of a name in `endpoint`.
    """
    announced = (endpoint.rpartition(":")[0], *hosts)
    through = [answer.observed for answer in heard if answer.reached]
    return "reached" if any(same_host(one, other) for one in through for other in announced) else "not reached"


def same_host(one: str, other: str) -> bool:
    """Whether two texts are one host, whatever the spelling of its address."""
    return _plain(one) == _plain(other)


def _plain(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return host.lower()


def how_to_be_reached(endpoint: str, observed: str, problem: str) -> str:
    """Tell the node's owner how it can be reached."""
    host, _, port = endpoint.rpartition(":")
    if observed != host:
        return (
            f"Others cannot call this node at {endpoint}: they see it at {observed}, as behind a home's NAT. Without a "
            "relay it answers no trainer and is averaged only with nodes that it calls itself. To be called directly, "
            f"forward port {port} of the router to this machine and say so with --announce"
        )
    return f"Others cannot call this node at {endpoint} ({problem}): let port {port} in through this machine's firewall"


def observed_host(peer: str) -> str:
    """The caller's IP address in gRPC's word for it, such as ipv4:192.0.2.1:4000; brackets around IPv6."""
    kind, _, rest = peer.partition(":")
    host = urllib.parse.unquote(rest).rpartition(":")[0]
    if kind not in {"ipv4", "ipv6"}:
        raise InvalidInputError("peer", f"calls from {kind[:20]!r} cannot be dialled back")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise InvalidInputError("peer", f"{host[:60]!r} is not an IP address") from None
    return host


def _is_private(host: str) -> bool:
    """Return whether the address is private; False for a name that could not be looked up."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return address.is_private and not address.is_loopback

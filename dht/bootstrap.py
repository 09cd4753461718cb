"""How a node gets into the DHT and stays in it: joining through initial peers, and finding lost peers again.

hivemind forgets a peer after one call that got no answer and never looks for it again. A machine that stalls for a few
seconds would forget everybody, be forgotten by everybody, and stay alone for good; so peers are remembered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from hivemind.dht.protocol import ValidationError
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.utils.multiaddr import Multiaddr

from common.errors import ConfigError, IdentityError, UnavailableError
from common.text import last_line
from dht.clock_watch import check_clock
from protocol.addresses import peer_multiaddress
from protocol.identity import public_key_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hivemind.dht.node import DHTNode

    from dht.bounded_calls import BoundedCalls
    from dht.peer_memory import PeerMemory
    from dht.transport import Transport

logger = logging.getLogger(__name__)

STRAGGLER_S = 0.3
"""How long the other initial peers have once one has answered."""

SEARCH_TIMEOUT_S = 3.0
KNOWN_TIMEOUT_S = 3.0
"""How long the first node of a swarm waits for those that it knew last time."""

REMEMBER_S = 600.0
MAX_REMEMBERED = 256
MAX_CALLS_PER_REFRESH = 16
MAX_CLOCKS_ASKED = 5
MAX_MULTIADDRESS_CHARS = 512


class InitialPeer(NamedTuple):
    """A peer to join through: `address` is where to dial, `text` what the user wrote."""

    peer_id: PeerID
    address: Multiaddr
    text: str


@dataclass(kw_only=True)
class Bootstrap:
    """Keeps one node's routing table filled."""

    node: DHTNode
    transport: Transport
    initial_peers: Sequence[InitialPeer]
    calls: BoundedCalls
    memory: PeerMemory
    _known: Sequence[InitialPeer] = ()
    _last_seen_s: dict[PeerID, float] = field(default_factory=dict)
    _addresses: dict[PeerID, tuple[Multiaddr, ...]] = field(default_factory=dict)

    @property
    def known_peers(self) -> int:
        """Peers in the routing table."""
        return len(self._table())

    async def join(self, timeout_s: float) -> None:
        """Meet the initial peers, and those of last time.

        Raises UnavailableError if there are initial peers and nobody answers within `timeout_s`.
        """
        others = [peer for peer in self.initial_peers if peer.peer_id != self.transport.peer_id]
        self._known = await self._remembered()
        asked = [*others, *self._known]
        if not asked:
            return
        problems = await self._greet_until_one_answers(asked, timeout_s if others else KNOWN_TIMEOUT_S)
        if others and all(problems.values()):
            check_clock(self._clocks_of(peer.peer_id for peer in asked))
            tried = "; ".join(f"{peer.text}: {problems[peer]}" for peer in others)
            raise UnavailableError(
                f"initial peers: none answered within {timeout_s:g} s ({tried}); "
                "check the addresses, and that a node runs at one of them"
            )
        await self._search_neighbors()
        await self._note_addresses()

    async def _remembered(self) -> list[InitialPeer]:
        named = {peer.peer_id for peer in self.initial_peers} | {self.transport.peer_id}
        found = []
        for text in await asyncio.to_thread(self.memory.load):
            with contextlib.suppress(ConfigError):  # a damaged file
                found.append(parse_initial_peer(text))
        return [peer for peer in found if peer.peer_id not in named]

    def _clocks_of(self, peers: Iterable[PeerID]) -> list[float]:
        found = map(self.transport.ahead_s, peers)
        return [ahead_s for ahead_s in found if ahead_s is not None]

    async def peers_clocks(self) -> list[float] | None:
        """How far peers' clocks are ahead of this node's; None without peers, nothing where none answers."""
        asked = list(self._table())[:MAX_CLOCKS_ASKED]
        if not asked:
            return None
        self.transport.forget_clocks()
        calls = [self.calls.begin(self.node.protocol.call_ping(peer_id)) for peer_id in asked]
        await asyncio.wait(calls, timeout=SEARCH_TIMEOUT_S)
        return self._clocks_of(asked)

    async def refresh(self) -> None:
        """Call peers that were lost, and ask those that are there for neighbors."""
        now_s = asyncio.get_running_loop().time()
        present = set(self._table())
        self._remember(present, now_s)
        await self._note_addresses()
        asked = [*self.initial_peers, *self._known]
        by_id = {peer.peer_id: peer for peer in asked if peer.peer_id != self.transport.peer_id}
        first = [peer.peer_id for peer in self.initial_peers if peer.peer_id in by_id]
        # Those of last time come last: many of them may be gone for good.
        lost = [peer_id for peer_id in dict.fromkeys((*first, *self._last_seen_s, *by_id)) if peer_id not in present]
        calls = (
            self._greet(by_id[peer_id]) if peer_id in by_id else self.node.protocol.call_ping(peer_id)
            for peer_id in lost[:MAX_CALLS_PER_REFRESH]
        )
        await asyncio.gather(*calls)
        await self._search_neighbors()

    async def rejoin(self) -> None:
        """Meet the others through a p2pd that has just been started and knows nobody's address yet.

        Peers that do not answer now are called again by `refresh`.
        """
        known = {peer.peer_id: (peer.address,) for peer in self.initial_peers if peer.peer_id != self.transport.peer_id}
        remembered = dict(list(self._addresses.items())[:MAX_CALLS_PER_REFRESH])
        await asyncio.gather(*(self._call_at(*peer) for peer in {**remembered, **known}.items()))
        await self._search_neighbors()

    async def _call_at(self, peer_id: PeerID, addresses: tuple[Multiaddr, ...]) -> None:
        try:
            async with asyncio.timeout(SEARCH_TIMEOUT_S):
                await self.transport.dial(peer_id, *addresses)
        except (ControlFailure, P2PDaemonError, OSError, EOFError) as error:  # TimeoutError is an OSError
            logger.debug("%s does not answer after the restart of p2pd: %s", peer_id, error)
            return
        await self.node.protocol.call_ping(peer_id)  # from now on it knows this node again

    async def _note_addresses(self) -> None:
        """Where the peers are that p2pd has a connection with: another p2pd would not know."""
        try:
            found = await self.transport.connections()
        except (ControlFailure, P2PDaemonError, OSError, EOFError) as error:
            logger.debug("p2pd does not tell its connections: %s", error)
            return
        fresh = {PeerID.from_base58(peer_id): tuple(map(Multiaddr, seen)) for peer_id, seen in found.items()}
        older = {peer_id: seen for peer_id, seen in self._addresses.items() if peer_id not in fresh}
        self._addresses = dict(list({**fresh, **older}.items())[:MAX_REMEMBERED])
        members = self._table().keys() & fresh.keys()
        peers = [f"{seen[0]}/p2p/{peer_id}" for peer_id, seen in fresh.items() if peer_id in members and seen]
        await asyncio.to_thread(self.memory.save, peers)

    def _table(self) -> dict[PeerID, Any]:
        table: dict[PeerID, Any] = self.node.protocol.routing_table.peer_id_to_uid
        return table

    def _remember(self, present: set[PeerID], now_s: float) -> None:
        self._last_seen_s.update(dict.fromkeys(present, now_s))
        recent = sorted(self._last_seen_s.items(), key=lambda item: -item[1])[:MAX_REMEMBERED]
        self._last_seen_s = {peer_id: seen_s for peer_id, seen_s in recent if now_s - seen_s < REMEMBER_S}

    async def _greet_until_one_answers(self, peers: Sequence[InitialPeer], timeout_s: float) -> dict[InitialPeer, str]:
        """Return what went wrong with each peer; empty for one that answered."""
        greetings = {peer: self.calls.begin(self._greet(peer)) for peer in peers}
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        waiting = set(greetings.values())
        while waiting and (left_s := deadline_s - loop.time()) > 0:
            done, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if any(not call.result() for call in done):
                deadline_s = min(deadline_s, loop.time() + STRAGGLER_S)
        return {peer: call.result() if call.done() else "no answer" for peer, call in greetings.items()}

    async def _greet(self, peer: InitialPeer) -> str:
        """Dial and exchange places in the DHT; the problem in words, empty if there is none."""
        try:
            await self.transport.dial(peer.peer_id, peer.address)
            # The peer calls back, so that a node which cannot be dialled learns so now.
            # It may call back over a connection with an address that this machine had before: then it is not asked to.
            answered = await self.node.protocol.call_ping(
                peer.peer_id, validate=True, strict=True
            ) or await self.node.protocol.call_ping(peer.peer_id)
        except ControlFailure as error:
            return last_line(str(error)) or "cannot be dialled"
        except (ValidationError, P2PDaemonError, OSError, EOFError) as error:
            return str(error)
        return "" if answered else "is there, but is no DHT node"

    async def _search_neighbors(self) -> None:
        """A search for our own place fills the table with those nearest to it (Kademlia, section 2.3)."""
        search = self.calls.begin(self.node.find_nearest_nodes([self.node.node_id]))
        done, _ = await asyncio.wait({search}, timeout=SEARCH_TIMEOUT_S)
        if done and search.exception() is not None:
            logger.debug("the search for neighbors failed: %r", search.exception())


def parse_initial_peer(text: str) -> InitialPeer:
    """Raises ConfigError unless `text` is a multiaddress that ends in an Ed25519 peer id."""
    problem = f"initial peer {text[:120]!r} is not a multiaddress such as /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW..."
    address, marker, peer_id = peer_multiaddress(text)[:MAX_MULTIADDRESS_CHARS].rpartition("/p2p/")
    if not marker or not address:
        raise ConfigError(problem)
    try:
        public_key_of(peer_id)
        return InitialPeer(PeerID.from_base58(peer_id), Multiaddr(address), text)
    except (IdentityError, ValueError, TypeError, LookupError) as error:
        raise ConfigError(f"{problem} ({error})") from None

"""What hivemind gets to see of a peer's messages: parts that could crash a lookup or hide other peers are taken out.

hivemind checks the records of an answer but believes the rest: one bad record makes it drop a whole answer, an infinite
expiration ends a search early, a wrong type crashes it, a stranger's claim to a place in the DHT replaces an honest
node's, and a record stored "in cache" shadows the stored ones. Pure functions on messages; `transport.py` applies them.
"""
# ruff: noqa: ANN401 - hivemind's messages have no types

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from common.errors import RecordError
from dht.packing import DICTIONARY_TAG, MAX_KEYS_PER_REQUEST, place_of_peer, unpack_dictionary

if TYPE_CHECKING:
    from collections.abc import Callable

    from hivemind.dht.routing import RoutingTable
    from hivemind.p2p import PeerID

    from dht.packing import RecordChecker

logger = logging.getLogger(__name__)

MAX_NEIGHBORS = 64


def node_id_of(peer_id: PeerID) -> DHTID:
    """A node's place in the DHT: fixed by its peer id, so that nobody can choose to sit beside a key."""
    return DHTID.from_bytes(place_of_peer(peer_id.to_bytes()))


def is_known(table: RoutingTable, place: int) -> bool:
    """Whether a place in the DHT is this node's own, or a lookup may begin there.

    It does not at those that only wait for a place in a full bucket.
    """
    return bool(place == table.node_id or place in table.buckets[table.get_bucket_index(place)].nodes_to_peer_id)


def clean_request(request: Any, sender: PeerID, checker: RecordChecker) -> None:
    """Take out what a sender may not claim; raises RecordError for a request with too many keys."""
    if request.peer.node_id not in {b"", node_id_of(sender).to_bytes()}:
        request.ClearField("peer")
    if not isinstance(request, dht_pb2.FindRequest | dht_pb2.StoreRequest):
        return
    if len(request.keys) > MAX_KEYS_PER_REQUEST:
        raise RecordError(f"keys: {len(request.keys)} in one request, but the limit is {MAX_KEYS_PER_REQUEST}")
    if isinstance(request, dht_pb2.StoreRequest):
        request.in_cache[:] = [False] * len(request.in_cache)
        for i, (key, tag) in enumerate(zip(request.keys, request.subkeys, strict=False)):
            if tag == DICTIONARY_TAG and i < len(request.values):
                request.values[i] = MSGPackSerializer.dumps(_good_records(key, request.values[i], checker))


def clean_response(
    request: Any, response: Any, sender: PeerID, knows: Callable[[int], bool], checker: RecordChecker
) -> None:
    """Take out what is not true, and neighbors that this node `knows` by their place: a lookup begins at these anyway.

    For every neighbor that is left hivemind makes an object, for each key again.

    Raises:
        P2PDaemonError: the sender lies about itself; hivemind takes this for no answer.
    """
    if response.peer.node_id not in {b"", node_id_of(sender).to_bytes()}:
        raise P2PDaemonError(f"{sender} claims another node's place")
    if isinstance(response, dht_pb2.FindResponse):
        for key, result in zip(request.keys, response.results, strict=False):
            _clean_neighbors(result, knows)
            _clean_value(key, result, checker)


def _clean_neighbors(result: Any, knows: Callable[[int], bool]) -> None:
    pairs = list(zip(result.nearest_node_ids, result.nearest_peer_ids, strict=False))[:MAX_NEIGHBORS]
    new = [(node, peer) for node, peer in pairs if not knows(int.from_bytes(node))]
    good = [(node, peer) for node, peer in new if node == place_of_peer(peer)]
    result.nearest_node_ids[:] = [node for node, _ in good]
    result.nearest_peer_ids[:] = [peer for _, peer in good]


def _clean_value(key: bytes, result: Any, checker: RecordChecker) -> None:
    found = result.type == dht_pb2.FOUND_DICTIONARY
    good = _good_records(key, result.value, checker) if found else DictionaryDHTValue()
    if len(good):
        result.value, result.expiration_time = MSGPackSerializer.dumps(good), good.latest_expiration_time
    else:
        result.ClearField("value")
        result.ClearField("expiration_time")
        result.type = dht_pb2.NOT_FOUND


def _good_records(key: bytes, packed: bytes, checker: RecordChecker) -> DictionaryDHTValue:
    good = DictionaryDHTValue()
    for record, owner in unpack_dictionary(key, packed):
        try:
            checker.check(record)
        except RecordError as error:
            logger.debug("ignored a record: %s", error)
        else:
            good.store(owner, record.value, record.expiration_time)
    return good

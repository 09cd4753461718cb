"""The signed records of one announcement, for nodes on asyncio and the lighthouse on trio. Pure.

Imports no hivemind, so that a lighthouse can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dht.record_store import Entry
from dht.record_versions import TTL_S, RecordVersions
from protocol.records import sign_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protocol.admission import Admission
    from protocol.identity import Identity


class RecordSigner:
    """Signs what one node says about itself in one run; a record lives `ttl_s` seconds."""

    def __init__(self, identity: Identity, admission: Admission, ttl_s: float = TTL_S) -> None:
        self._identity = identity
        self._ticket = admission.ticket(identity.peer_id)
        self._versions = RecordVersions(ttl_s)

    def sign(self, payloads: Mapping[str, bytes], now_s: float) -> list[Entry]:
        """A record for each payload, by its key; all of one version, newer than any before."""
        self._versions.advance(now_s)
        owner, until_s = self._identity.peer_id, self._versions.expiration_s
        return [Entry(key, owner, self._sign(key, payload), until_s) for key, payload in payloads.items()]

    def _sign(self, key: str, payload: bytes) -> bytes:
        version, until_s = self._versions.version, self._versions.expiration_s
        return sign_record(
            self._identity, key=key, version=version, expiration_s=until_s, payload=payload, ticket=self._ticket
        )

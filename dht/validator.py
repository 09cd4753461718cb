"""Which records a node takes in: from a peer that stores here, and from a peer that answers a lookup.

hivemind asks `RecordValidator` before it stores or returns anything; `packing.py` has what is checked of a record.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.routing import DHTID

from common.errors import RecordError
from dht.packing import check_capacity, check_in_run

if TYPE_CHECKING:
    from dht.packing import RecordChecker
    from protocol.manifest import Manifest
    from protocol.records import SignedRecord

logger = logging.getLogger(__name__)


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """Refuses what `RecordChecker` refuses, what there is no room for and, after `serve_only`, other runs' records."""

    def __init__(self, checker: RecordChecker) -> None:
        self._checker = checker
        self._storage: Any = None
        self._manifest: Manifest | None = None

    def attach(self, storage: Any) -> None:  # noqa: ANN401
        """Set the hivemind storage whose size is bounded."""
        self._storage = storage

    def serve_only(self, manifest: Manifest) -> None:
        """Store only records of this run, and of blocks that its model has, from now on."""
        self._manifest = manifest

    def validate(self, record: DHTRecord) -> bool:
        """Called by hivemind for every record that comes in or is stored by this node itself."""
        try:
            signed = self._checker.check(record)
            self._check_belongs(signed)
            self._check_capacity(record, signed)
        except RecordError as error:
            logger.debug("refused a record: %s", error)
            return False
        return True

    def _check_belongs(self, signed: SignedRecord) -> None:
        if self._manifest is not None:
            check_in_run(signed, self._manifest.run_id, self._manifest.model)

    def _check_capacity(self, record: DHTRecord, signed: SignedRecord) -> None:
        if self._storage is not None:
            stored = self._storage.get(DHTID.from_bytes(record.key))
            owners = None if stored is None else stored.value
            check_capacity(len(self._storage), owners, signed)

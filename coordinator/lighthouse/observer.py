"""What a run looks like from here: its records, looked up and checked as every node checks them, and counted."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from common.errors import ManifestError, RecordError
from dht.record_cache import RecordCache
from protocol.announcements import ROLES, BlockRecord, PeerRecord
from protocol.manifest import all_blocks
from protocol.records import block_key, decode_manifest, manifest_key, open_record, peers_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from protocol.admission import Admission
    from protocol.manifest import BlockId, Manifest
    from protocol.records import Said, SignedRecord

logger = logging.getLogger(__name__)

OBSERVE_S = 10.0


class Lookups(Protocol):
    """The part of a member that an observer needs."""

    async def look_up(self, keys: Iterable[str], take: Callable[[str, dict[str, bytes]], None]) -> None:
        """Find records, unchecked, by key and owner."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Counts at one moment. `replicas`: of each block that the run has; empty until its manifest is found."""

    peers: Mapping[str, int] = field(default_factory=lambda: MappingProxyType(dict.fromkeys(ROLES, 0)))
    replicas: Mapping[BlockId, int] = field(default_factory=lambda: MappingProxyType({}))
    target_replicas: int = 0

    @property
    def n_blocks(self) -> dict[str, int]:
        """Blocks by how well they are held: "lost", "few" (fewer replicas than aimed for) and "full"."""
        counts = self.replicas.values()
        lost, full = sum(not count for count in counts), sum(count >= self.target_replicas for count in counts if count)
        return {"lost": lost, "few": len(counts) - lost - full, "full": full}


class Observer:
    """Looks a run up again and again; `view` is what it saw last, `on_manifest` is told when the run is known."""

    def __init__(
        self,
        lookups: Lookups,
        admission: Admission,
        clock: Callable[[], float],
        on_manifest: Callable[[Manifest], None],
    ) -> None:
        self._lookups, self._run_id, self._clock, self._on_manifest = lookups, admission.run_id, clock, on_manifest
        self._record_cache = RecordCache(admission)
        self._manifest: Manifest | None = None
        self.view = RunView()

    async def observe(self) -> None:
        """Look once; a run that nobody answers for leaves an empty view."""
        if self._manifest is None:
            await self._lookups.look_up([manifest_key(self._run_id)], self._take_manifest)
        blocks = all_blocks(self._manifest.model) if self._manifest else ()
        keys = [peers_key(self._run_id), *(block_key(self._run_id, block) for block in blocks)]
        await self._lookups.look_up(keys, self._take)
        self.view = run_view(self._record_cache.live(self._clock()), self._manifest)

    def _take(self, key: str, found: dict[str, bytes]) -> None:
        self._record_cache.take({key: found}, self._clock())

    def _take_manifest(self, key: str, found: dict[str, bytes]) -> None:
        for raw in found.values():
            if self._manifest is not None:
                return
            try:
                self._manifest = decode_manifest(open_record(raw, key=key, now_s=self._clock()))
            except (RecordError, ManifestError) as error:
                logger.debug("ignored a manifest: %s", error)
            else:
                self._on_manifest(self._manifest)


def run_view(live: Iterable[tuple[SignedRecord, Said]], manifest: Manifest | None) -> RunView:
    """Count records that are alive and checked."""
    roles, replicas = Counter[str](dict.fromkeys(ROLES, 0)), Counter["BlockId"]()
    if manifest is not None:
        replicas.update(dict.fromkeys(all_blocks(manifest.model), 0))
    for _, said in live:
        if isinstance(said, PeerRecord):
            roles[said.role] += 1
        elif isinstance(said, BlockRecord) and manifest and said.block in replicas and _serves(said, manifest):
            replicas[said.block] += 1
    target = manifest.averaging.target_replicas if manifest else 0
    return RunView(
        peers=MappingProxyType(dict(roles)), replicas=MappingProxyType(dict(replicas)), target_replicas=target
    )


def _serves(said: BlockRecord, manifest: Manifest) -> bool:
    return said.state == "serving" and said.n_experts == len(manifest.model.block_experts(said.block.block))

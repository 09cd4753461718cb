"""Getting a run's manifest from its id alone, and keeping it available when its owner is gone."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from common.errors import ManifestError, RecordError, UnavailableError
from dht.record_store import Entry
from protocol.records import (
    MAX_MANIFEST_TTL_S,
    decode_manifest,
    encode_manifest,
    manifest_key,
    open_record,
    sign_record,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dht.record_store import RecordStore
    from protocol.identity import Identity
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

TTL_S = MAX_MANIFEST_TTL_S - 3600.0
"""Below the limit by more than clocks differ. The owner publishes again at every start, and this starts anew."""

RETRY_S = 0.5


async def publish_manifest(dht: RecordStore, identity: Identity, manifest: Manifest) -> None:
    """Sign the manifest as its owner and store it, now and again while this node lives.

    Raises:
        ManifestError: `identity` is not the owner that the manifest names.
        UnavailableError: no peer took it.
    """
    if manifest.owner != identity.peer_id:
        raise ManifestError(f"owner: the manifest names {manifest.owner or 'nobody'}, this key is {identity.peer_id}")
    key, now_s = manifest_key(manifest.run_id), dht.now_s()
    raw = sign_record(
        identity,
        key=key,
        version=int(now_s * 1000),
        expiration_s=now_s + TTL_S,
        payload=encode_manifest(manifest),
    )
    entry = Entry(key, identity.peer_id, raw, now_s + TTL_S)
    if not all(await dht.store_many([entry])):
        raise UnavailableError(f"manifest of run {manifest.run_id}: no peer took it; check that this clock is right")
    dht.keep(entry)


async def fetch_manifest(dht: RecordStore, run_id: str, timeout_s: float) -> Manifest:
    """Find the manifest that `run_id` names, and from now on help to keep it available.

    Raises:
        UnavailableError: no peer has it, or none answers, within `timeout_s`.
        ManifestError: this version of the program cannot read it.
    """
    key, problem = manifest_key(run_id), "no peer has it"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    return _first_good(dht, key, (await dht.get_many([key])).get(key, {}))
                except (RecordError, UnavailableError) as error:
                    problem = str(error)
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        raise UnavailableError(
            f"manifest of run {run_id}: not found in {timeout_s:g} s ({problem}); "
            "check the run id, and that its coordinator or another peer of the run is up"
        ) from None


def _first_good(dht: RecordStore, key: str, found: Mapping[str, bytes]) -> Manifest:
    problem = RecordError("no peer has it")
    for owner, raw in found.items():
        try:
            record = open_record(raw, key=key, now_s=dht.now_s())
            manifest = decode_manifest(record)
        except RecordError as error:
            problem = error
            continue
        dht.keep(Entry(key, owner, raw, record.expiration_s))
        return manifest
    raise problem

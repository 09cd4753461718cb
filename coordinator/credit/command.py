"""`credit`: collects the receipts of a run that is up, shows what they come to, and writes it to files."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rich.console import Console

from common.atomic_file import write_atomically
from common.errors import DrainingError
from common.folders import prepare_folder
from common.settings import check_minimums
from common.tasks import until_stopped
from coordinator.credit.collection import open_collection
from coordinator.credit.show import render_sums, sums_csv, sums_json
from coordinator.credit.sums import read_sums
from dht.addresses import listen_host
from dht.join import fetch_manifest
from dht.node import DhtConfig, DhtNode
from dht.swarm_config import resolve
from protocol.identity import Identity

if TYPE_CHECKING:
    from coordinator.credit.config import CreditConfig
    from coordinator.credit.sums import CreditSums

logger = logging.getLogger(__name__)
MINIMUMS = {"timeout_s": 0.1}


async def run_credit(config: CreditConfig, stop: asyncio.Event) -> None:
    """Collect, print, write. Raises ConfigError; UnavailableError if the swarm does not answer; StorageError."""
    check_minimums(config, MINIMUMS)
    prepare_folder(config.out)
    try:
        sums = await until_stopped(_collected(config), stop)
    except DrainingError:
        return
    Console().print(render_sums(sums))
    for path, text in ((config.csv, sums_csv), (config.json, sums_json)):
        if path is not None:
            write_atomically(path, text(sums).encode())


async def _collected(config: CreditConfig) -> CreditSums:
    admission, initial_peers = resolve(config)
    identity = Identity.generate()
    dht = await DhtNode.start(
        DhtConfig(
            identity=identity,
            initial_peers=initial_peers,
            host=await asyncio.to_thread(listen_host, config.listen, initial_peers),
            start_timeout_s=config.timeout_s,
            admission=admission,
        )
    )
    try:
        manifest = await fetch_manifest(dht, admission.run_id, config.timeout_s)
        async with open_collection(config.out, dht, identity, admission) as collection:
            collected = await collection.collect()
            if not collected.asked:
                logger.warning("No host or trainer of run %s is announced now", admission.run_id)
            elif collected.answered < collected.asked:
                missing = collected.asked - collected.answered
                logger.warning("%d of %d peers gave no receipts; ask again later", missing, collected.asked)
            return await asyncio.to_thread(read_sums, collection.ledger, manifest.run_id, manifest.model)
    finally:
        await dht.stop()

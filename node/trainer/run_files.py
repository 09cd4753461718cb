"""The tokenizer of a run, from the file that the manifest names by its hash. Before the path of a step."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from common.assets import asset_of, asset_store, assets_in_use, read_file
from common.errors import ConfigError, DataError, UnavailableError
from common.progress import progress_shown
from common.tasks import until_stopped
from common.tokenizer import ByteTokenizer, FileTokenizer
from common.vocabulary import MAX_TOKENIZER_BYTES
from node.trainer.asset_fetch import AssetFetch

if TYPE_CHECKING:
    from common.assets import Asset
    from common.tokenizer import Tokenizer
    from node.membership.swarm import Swarm
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

SHOWN_AFTER_S = 2.0
ASK_AGAIN_S = 1.0
REMEDY = (
    "Name a tokenizer's file in the setting tokenizer; a pretrained model comes here by `coordinator --model`, or from "
    "a trainer that has it"
)


async def fetch_tokenizer(swarm: Swarm, given: str, timeout_s: float, stop: asyncio.Event) -> Tokenizer:
    """The run's tokenizer as `open_tokenizer` finds it, or else from one of the run's trainers.

    The run's other files are fetched too: once this returns, all are on this machine, and stay there until the swarm is
    left. Raises what `open_tokenizer` does, DataError too if no trainer sends a file within `timeout_s`.
    """
    in_use = ExitStack()
    swarm.on_leave(in_use.close)
    await asyncio.to_thread(in_use.enter_context, assets_in_use(swarm.manifest.assets))
    tokenizer = swarm.manifest.data.tokenizer_asset
    for asset in swarm.manifest.assets:
        if asset == tokenizer and given:
            continue
        if not await asyncio.to_thread(asset_store().holds, asset):
            await until_stopped(_fetch(swarm, asset, timeout_s), stop)
    return await asyncio.to_thread(open_tokenizer, swarm.manifest, given)


async def _fetch(swarm: Swarm, asset: Asset, timeout_s: float) -> None:
    logger.info("Asking the run's trainers for the file %s", asset)
    run_id, caller, store = swarm.manifest.run_id, swarm.security.caller(), asset_store()
    with progress_shown(asset.n_bytes, SHOWN_AFTER_S) as tell:
        of_bytes = f"of {asset.n_bytes / 1e6:.1f} MB of {asset.sha256[:12]}"
        fetch = AssetFetch(caller, run_id, asset, store, lambda done: tell(done, f"{done / 1e6:.1f} {of_bytes}"))
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            own = swarm.identity.peer_id
            sources = [trunk.address for trunk in swarm.directory.snapshot().trunk if trunk.peer_id != own]
            try:
                with store.gathering(asset) as alone:
                    if await asyncio.to_thread(store.holds, asset):
                        return None
                    if alone:
                        return await fetch.fetch(sources)
            except UnavailableError as error:
                if asyncio.get_running_loop().time() >= deadline:
                    raise DataError(f"{error}. {REMEDY}") from None
            await asyncio.sleep(ASK_AGAIN_S)


def open_tokenizer(manifest: Manifest, given: str) -> Tokenizer:
    """The run's tokenizer: from the file `given`, which is kept for the next time, or, if empty, from what is kept.

    Raises:
        ConfigError: `given` is not the run's, or the run has none.
        DataError: it is not on this machine, cannot be read, or has more tokens than the model.
    """
    asset = manifest.data.tokenizer_asset
    if asset is None:
        if given:
            raise ConfigError(f"tokenizer: is {given}, but the tokens of this run are bytes; leave it out")
        return ByteTokenizer()
    data = _given(asset, Path(given)) if given else _kept(asset)
    tokenizer = FileTokenizer(data, given or f"the tokenizer {asset}")
    if tokenizer.vocab_size > manifest.model.vocab_size:
        raise DataError(
            f"the tokenizer {asset} has {tokenizer.vocab_size:,} tokens, the model of this run only "
            f"{manifest.model.vocab_size:,}: the run's owner has to create it anew"
        )
    return tokenizer


def _given(asset: Asset, path: Path) -> bytes:
    data = read_file(path, MAX_TOKENIZER_BYTES)
    if asset_of(data) != asset:
        raise ConfigError(f"tokenizer: {path} is {asset_of(data)}, the run's is {asset}; give the run's own file")
    asset_store().add(data)
    return data


def _kept(asset: Asset) -> bytes:
    data = asset_store().find(asset)
    if data is None:
        raise DataError(f"the run's tokenizer {asset} is not on this machine: name its file in the setting tokenizer")
    return data

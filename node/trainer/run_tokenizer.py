"""The tokenizer of a run, from the file that the manifest names by its hash. Before the path of a step."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from common.assets import asset_of, asset_store, read_file
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


async def fetch_tokenizer(swarm: Swarm, given: str, timeout_s: float, stop: asyncio.Event) -> Tokenizer:
    """The run's tokenizer as `open_tokenizer` finds it, or else from one of the run's trainers.

    Raises what `open_tokenizer` does, DataError too if no trainer sends it within `timeout_s`.
    """
    asset = swarm.manifest.data.tokenizer_asset
    if asset is not None and not given and asset_store().find(asset) is None:
        data = await until_stopped(_fetched(swarm, asset, timeout_s), stop)
        await asyncio.to_thread(asset_store().add, data)
    return await asyncio.to_thread(open_tokenizer, swarm.manifest, given)


async def _fetched(swarm: Swarm, asset: Asset, timeout_s: float) -> bytes:
    logger.info("Asking the run's trainers for its tokenizer %s", asset)
    with progress_shown(asset.n_bytes, SHOWN_AFTER_S) as tell:
        words = f"fetching the tokenizer, {asset.n_bytes / 1e6:.1f} MB"
        fetch = AssetFetch(swarm.security.caller(), swarm.manifest.run_id, asset, lambda done: tell(done, words))
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            own = swarm.identity.peer_id
            sources = [trunk.address for trunk in swarm.directory.snapshot().trunk if trunk.peer_id != own]
            try:
                return await fetch.fetch(sources)
            except UnavailableError as error:
                if asyncio.get_running_loop().time() >= deadline:
                    raise DataError(f"{error}. Name its file in the setting tokenizer.") from None
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

"""The tokenizer of a run, from the file that the manifest names by its hash. Before the path of a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.assets import asset_of, asset_store, read_file
from common.errors import ConfigError, DataError
from common.tokenizer import ByteTokenizer, FileTokenizer
from common.vocabulary import MAX_TOKENIZER_BYTES

if TYPE_CHECKING:
    from common.assets import Asset
    from common.tokenizer import Tokenizer
    from protocol.manifest import Manifest


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

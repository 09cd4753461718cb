"""The tokens of a new run: what its manifest says of a tokenizer's file, and the training of one beforehand."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from common.assets import asset_of, asset_store, read_file
from common.atomic_file import write_atomically
from common.command_line import arguments_for
from common.errors import ConfigError, UnavailableError
from common.vocabulary import BYTE_VALUES, MAX_TOKENIZER_BYTES, MAX_VOCABULARY
from coordinator.children import PROGRAM, Child, ChildSpec, end_all, exit_words
from protocol.run_assets import DataConfig

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from coordinator.config import RunConfig
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

FILE_NAME = "tokenizer.json"
STOP_PATIENCE_S = 2.3
"""How long the training of a tokenizer may take to end after Ctrl+C."""


def tokens_of(path: Path) -> tuple[DataConfig, int]:
    """What a manifest says of a tokenizer's file, and its number of tokens. Raises ConfigError and DataError."""
    from common.tokenizer import FileTokenizer  # noqa: PLC0415 - brings numpy, which `--help` has no need of

    data = read_file(path, MAX_TOKENIZER_BYTES)
    asset = asset_of(data)
    config = DataConfig(tokenizer=asset.sha256, tokenizer_bytes=asset.n_bytes)
    return config, FileTokenizer(data, str(path)).vocab_size


def keep_tokenizer(manifest: Manifest, out: Path, given: Path | None) -> None:
    """Keep a run's tokenizer in the run's folder, and where the trainers of this machine look for it.

    Raises ConfigError for a file that is not the run's, DataError if it cannot be kept.
    """
    path = out / FILE_NAME
    if manifest.data.tokenizer_asset is None:
        return
    if given is None and not path.exists():
        logger.warning(
            "The run's tokenizer is not in %s: trainers need its file; add --tokenizer to put it there", path
        )
        return
    data = read_file(given or path, MAX_TOKENIZER_BYTES)
    if asset_of(data) != manifest.data.tokenizer_asset:
        raise ConfigError(
            f"{given or path}: is {asset_of(data)}, the run's tokenizer is {manifest.data.tokenizer_asset}; give the "
            "run's own with --tokenizer"
        )
    write_atomically(path, data)
    asset_store().add(data)


def check_training(config: RunConfig) -> None:
    """Raise ConfigError for what cannot be trained."""
    n_tokens = config.train_tokenizer
    if n_tokens and config.tokenizer is not None:
        raise ConfigError("--tokenizer and --train-tokenizer: give one of them")
    if n_tokens and not BYTE_VALUES < n_tokens <= MAX_VOCABULARY:
        raise ConfigError(f"--train-tokenizer: must be from {BYTE_VALUES + 1} to {MAX_VOCABULARY}, is {n_tokens}")


async def trained_tokenizer(config: RunConfig, data: Path | None, out: Path, stop: asyncio.Event) -> Path | None:
    """Train a tokenizer in a process of its own, which shows its progress, and return its file in folder `out`.

    None once `stop` is set. Raises UnavailableError if the training fails.
    """
    path = out / FILE_NAME
    flags = arguments_for({"vocab_size": config.train_tokenizer, "data": data, "out": path, "seed": config.seed})
    child = Child(ChildSpec(name="tokenizer", argv=(*PROGRAM, "tokenizer", *flags, "--stop-on-stdin-eof")))
    try:
        await child.wait(stop)
    finally:
        ended = child.ended()
        await end_all([child], stop, patience_s=STOP_PATIENCE_S, stop_patience_s=STOP_PATIENCE_S)
    if not ended or stop.is_set():
        return None
    if code := child.reap():
        raise UnavailableError(f"the training of the tokenizer {exit_words(code)}; what it said stands above")
    return path

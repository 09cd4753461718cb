"""A run around a pretrained model: what its manifest says of the model, and where trainers of this machine find it."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from common.assets import asset_of, asset_of_file, asset_store
from common.atomic_file import write_atomically
from common.errors import ConfigError
from common.pretrained_source import PretrainedShape, PretrainedSource, find_pretrained, shape_of
from common.progress import progress_shown
from common.text import bytes_text
from coordinator.tokens import FILE_NAME
from protocol.manifest import MAX_NAME_CHARS
from protocol.run_assets import DataConfig, PretrainedConfig, PretrainedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coordinator.config import RunConfig
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

SHOWN_AFTER_S: Final = 2.0
PASSES: Final = 3
"""A file is read so often at most until a copy is kept: to know it, to copy it, and the copy to check it."""

DEFAULTS: Final[dict[str, Any]] = {
    "d_model": 0,
    "heads": 0,
    "layers": 4,
    "expert_kind": "lora",
    "expert_hidden": 2,
    "experts_per_token": 8,
    "gate": "topk",
    "gate_reads": "hidden",
    "gate_heads": 1,
    "gate_score": "sigmoid",
    "gate_lr_fraction": 1.0,
    "smear": 0,
    "balance": "sign",
    "balance_rate": 5e-3,
    "lr": 0.03,
    "expert_lr": 0.03,
    "warmup_tokens": 1400,
    "steps": 110,
    "batch": 1,
    "eval_bytes": 4096,
}
"""What a setting that is not given is in a run around a pretrained model: `experiment adapters` found it.

The width and the heads are the model's, which 0 stands for.
"""


def preset_around(model: str) -> dict[str, object]:
    """What settings that are not given are in a run around the pretrained model that a person calls `model`."""
    return {"name": _run_name(model), **DEFAULTS}


def _run_name(model: str) -> str:
    """The model's name without its owner, its revision and what a run's name cannot have."""
    name = model.partition("@")[0].rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:MAX_NAME_CHARS] or "model"


@lru_cache(maxsize=1)
def described(name: str) -> tuple[PretrainedSource, PretrainedShape, tuple[PretrainedFile, ...]]:
    """The model that a person calls `name`, its shape, and its files as a manifest has them. Raises ConfigError."""
    logger.info("Reading the pretrained model %s", name)
    source = find_pretrained(name)
    files = files_of(source)
    logger.info("Reading the tokenizer of the pretrained model")
    return source, shape_of(source), files


def files_of(source: PretrainedSource) -> tuple[PretrainedFile, ...]:
    """The files of a model as a manifest has them. Raises ConfigError."""
    files = []
    with _bytes_told("read to know the pretrained model's files by what they hold", _n_bytes(source)) as tell:
        for file in source.names:
            try:
                asset = asset_of_file(source.folder / file, tell)
            except OSError as error:
                raise ConfigError(
                    f"--model {source.folder / file}: cannot be read: {error.strerror or error}"
                ) from None
            files.append(PretrainedFile(name=file, sha256=asset.sha256, n_bytes=asset.n_bytes))
    return tuple(files)


def _n_bytes(source: PretrainedSource) -> int:
    return sum(path.stat().st_size for path in map(source.folder.joinpath, source.names) if path.is_file())


@contextmanager
def _bytes_told(what: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show how many bytes have been `what` while the context lasts; it gives what hears of each piece."""
    done = 0
    with progress_shown(n_bytes, SHOWN_AFTER_S) as show:

        def tell(of_piece: int) -> None:
            nonlocal done
            done += of_piece
            show(done, f"{bytes_text(done)} of {bytes_text(n_bytes)} {what}")

        yield tell


def parts_of(config: RunConfig) -> tuple[PretrainedConfig, DataConfig, PretrainedShape]:
    """What a manifest says of the model and of its tokens, which are the model's own. Raises ConfigError."""
    if config.tokenizer or config.train_tokenizer:
        raise ConfigError("--model: brings its tokenizer along; leave out --tokenizer and --train-tokenizer")
    if config.d_model or config.heads:
        raise ConfigError("--model: brings its width and its attention along; leave out --d-model and --heads")
    _, shape, files = described(config.model)
    if not 1 <= config.layers <= shape.n_layers:
        raise ConfigError(f"--layers: must be from 1 to the model's {shape.n_layers}, is {config.layers}")
    if config.context > shape.max_context:
        raise ConfigError(f"--context: the model reads at most {shape.max_context} tokens, is {config.context}")
    attach = tuple(range(shape.n_layers - config.layers, shape.n_layers))
    tokenizer = asset_of(shape.tokenizer)
    return (
        PretrainedConfig(files=files, dtype=config.pretrained_dtype, attach=attach, unfreeze=config.unfreeze),
        DataConfig(tokenizer=tokenizer.sha256, tokenizer_bytes=tokenizer.n_bytes),
        shape,
    )


def keep_pretrained(manifest: Manifest, out: Path, name: str) -> None:
    """Keep the model's files and its tokenizer where the trainers of this machine look for them.

    Raises ConfigError where the model that is called `name` is not the run's, DataError if it cannot be kept.
    """
    if not name:
        return
    source, shape, files = described(name)
    if files != manifest.pretrained.files:
        raise ConfigError(f"--model {name}: has other files than the model of the run in {out}")
    store = asset_store()
    with _bytes_told("read to keep a copy of the pretrained model", PASSES * _n_bytes(source)) as tell:
        for file in source.names:
            store.add_file(source.folder / file, tell)
    if asset_of(shape.tokenizer) == manifest.data.tokenizer_asset:  # else an older version has read the same files
        write_atomically(out / FILE_NAME, shape.tokenizer)
        store.add(shape.tokenizer)

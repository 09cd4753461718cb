"""A pretrained language model from the files that a run's manifest names, as the library `transformers` loads it."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError

from common.assets import asset_store
from common.errors import DataError
from common.pretrained_source import READ_ERRORS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from protocol.run_assets import PretrainedConfig

GGUF_SUFFIX: Final = ".gguf"
LOAD_ERRORS: Final = (*READ_ERRORS, RuntimeError, SafetensorError)
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


@lru_cache(maxsize=1)
def language_model(config: PretrainedConfig) -> PreTrainedModel:
    """Load the model on the CPU; a second trunk of the process gets the same one. Nothing may change its weights.

    No code of the files' own is run, and weights are read from safetensors or GGUF alone. Raises DataError where a file
    is not on this machine, or where they are no causal language model.
    """
    store = asset_store()
    missing = [file.name for file in config.files if not store.holds(file.asset)]
    if missing:
        raise DataError(f"{', '.join(missing)} of the run's pretrained model is not on this machine")
    folder = store.folder_of({file.name: file.asset for file in config.files})
    return loaded(folder, [file.name for file in config.files], DTYPES[config.dtype])


def loaded(folder: Path, names: list[str], dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder whose files have these `names`. Raises DataError."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - takes a second, and few runs need it

    gguf = next((name for name in names if name.endswith(GGUF_SUFFIX)), None)
    with quiet_transformers(), naming_load_errors(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its bars and its advice, which are about code that a user of ours does not write."""
    from transformers.utils import logging as library_logging  # noqa: PLC0415

    shown = library_logging.is_progress_bar_enabled()
    level = library_logging.get_verbosity()
    library_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    library_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if shown:
            library_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def naming_load_errors(folder: Path) -> Iterator[None]:
    """Turn what the library raises for files that it cannot read into a DataError that names them."""
    try:
        yield
    except LOAD_ERRORS as error:
        problem = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise DataError(f"{folder}: no causal language model that transformers loads: {problem}") from None

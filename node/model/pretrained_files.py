"""A pretrained language model from the files that a run's manifest names, as the library `transformers` loads it."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from common.assets import asset_store
from common.errors import DataError
from common.pretrained_source import READ_ERRORS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from protocol.run_assets import PretrainedConfig

GGUF_SUFFIX: Final = ".gguf"
SAFETENSORS_SUFFIX: Final = ".safetensors"
LOAD_ERRORS: Final = (*READ_ERRORS, RuntimeError, SafetensorError, StrictDataclassError)
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXACT_IN_FP32: Final = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Types of tensors in safetensors that take half of float32's memory, and lose nothing on their way there."""


@lru_cache(maxsize=1)
def language_model(config: PretrainedConfig) -> PreTrainedModel:
    """Load the model on the CPU; a second trunk of the process gets the same one. Nothing may change its weights.

    No code of the files' own is run, and weights are read from safetensors or GGUF alone. Raises DataError where a file
    is not on this machine, or where they are no causal language model.
    """
    return loaded(model_folder(config), [file.name for file in config.files], DTYPES[config.dtype])


def model_folder(config: PretrainedConfig) -> Path:
    """A folder in which the model's files have their names. DataError where one is not on this machine."""
    store = asset_store()
    missing = [file.name for file in config.files if not store.holds(file.asset)]
    if missing:
        raise DataError(f"{', '.join(missing)} of the run's pretrained model is not on this machine")
    return store.folder_of({file.name: file.asset for file in config.files})


def loaded_sparingly(config: PretrainedConfig) -> PreTrainedModel:
    """The model to be read and not computed with: in a smaller type than the run's where that loses nothing.

    The weights are then the files' own pages, which take no memory that the system could not have back. Raises what
    `language_model` does.
    """
    folder, names = model_folder(config), [file.name for file in config.files]
    with naming_load_errors(folder):
        types = _types(folder, names)
    kinds = set(types.values())
    dtype = EXACT_IN_FP32.get(next(iter(kinds))) if len(kinds) == 1 and config.dtype == "fp32" else None
    if dtype is not None:
        model = loaded(folder, names, dtype)
        if types.keys() <= model.state_dict().keys():  # else some were computed on their way, in this type
            return model
    return loaded(folder, names, DTYPES[config.dtype])


def _types(folder: Path, names: list[str]) -> dict[str, str]:
    """The type of each tensor in safetensors, by its name."""
    types: dict[str, str] = {}
    for name in names:
        if name.endswith(SAFETENSORS_SUFFIX):
            with safe_open(folder / name, framework="pt") as file:
                types |= {tensor: file.get_slice(tensor).get_dtype() for tensor in file.keys()}  # noqa: SIM118 - no dict
    return types


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
def naming_load_errors(what: Path | str) -> Iterator[None]:
    """Turn what the library raises for files that it cannot read into a DataError that says of `what` it is."""
    try:
        yield
    except LOAD_ERRORS as error:
        problem = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise DataError(f"{what}: no causal language model that transformers loads: {problem}") from None

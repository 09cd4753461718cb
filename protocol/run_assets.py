"""The parts of a manifest that name files: what a token is, and the pretrained model that a run is built around."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from common.assets import Asset
from common.errors import ManifestError
from common.vocabulary import BYTE_VALUES, BYTES, MAX_TOKENIZER_BYTES

MAX_FILES = 32
MAX_FILE_BYTES = 1 << 40
MAX_UNFROZEN = 32
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_PARAMETER = re.compile(r"[A-Za-z0-9_.]{1,128}")

PretrainedDtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a token is: a byte, or a piece of text as a file says, in the form of the library `tokenizers`.

    `tokenizer` is "bytes" or the file's SHA-256 in hex digits, and `tokenizer_bytes` the file's size.
    """

    tokenizer: str = BYTES
    tokenizer_bytes: int = 0

    @property
    def tokenizer_asset(self) -> Asset | None:
        """The tokenizer's file; None where tokens are bytes."""
        if self.tokenizer == BYTES:
            return None
        return Asset(sha256=self.tokenizer, n_bytes=self.tokenizer_bytes)


@dataclass(frozen=True, kw_only=True)
class PretrainedFile:
    """One file of a pretrained model, by its name in the model's folder and by what it holds."""

    name: str
    sha256: str
    n_bytes: int

    @property
    def asset(self) -> Asset:
        """The file by what it holds."""
        return Asset(sha256=self.sha256, n_bytes=self.n_bytes)


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """A causal language model in the form of the library `transformers`, whose weights stay as they are.

    `files` are those of its folder, or the one of a GGUF; `dtype` is that of its weights. `attach` are its layers, in
    rising order, whose feed-forward parts have experts beside them: the run's layers in their order. Parameters whose
    names begin with one of `unfreeze` are trained like the trunk.
    """

    files: tuple[PretrainedFile, ...] = ()
    dtype: PretrainedDtype = "fp32"
    attach: tuple[int, ...] = ()
    unfreeze: tuple[str, ...] = ()


def check_data(data: DataConfig, vocab_size: int) -> None:
    """Raise ManifestError, naming the field, for what cannot be."""
    if data.tokenizer == BYTES:
        if vocab_size != BYTE_VALUES:
            raise ManifestError(f"model.vocab_size: must be {BYTE_VALUES} where tokens are bytes, is {vocab_size}")
        if data.tokenizer_bytes:
            raise ManifestError(f"data.tokenizer_bytes: must be 0 where tokens are bytes, is {data.tokenizer_bytes}")
        return
    if not _SHA256.fullmatch(data.tokenizer):
        raise ManifestError(f"data.tokenizer: must be {BYTES} or 64 hex digits, is {data.tokenizer[:80]!r}")
    if not 1 <= data.tokenizer_bytes <= MAX_TOKENIZER_BYTES:
        raise ManifestError(f"data.tokenizer_bytes: must be from 1 to {MAX_TOKENIZER_BYTES}, is {data.tokenizer_bytes}")


def check_pretrained(pretrained: PretrainedConfig, trunk: str, gate: str, n_layers: int) -> None:
    """Raise ManifestError, naming the field, for what cannot be."""
    if trunk == "hf" and gate == "hash" and not pretrained.unfreeze:
        raise ManifestError(
            "pretrained.unfreeze: must name what trainers train where gate is hash, which learns nothing; or take topk"
        )
    if trunk != "hf":
        if pretrained != PretrainedConfig():
            raise ManifestError("pretrained: must be absent unless model.trunk is hf")
        return
    names = [file.name for file in pretrained.files]
    if not 1 <= len(names) <= MAX_FILES or len(set(names)) != len(names):
        raise ManifestError(f"pretrained.files: must be 1 to {MAX_FILES} of different names, are {len(names)}")
    for file in pretrained.files:
        _check_file(file)
    attach = pretrained.attach
    if len(attach) != n_layers or any(layer < 0 for layer in attach) or list(attach) != sorted(set(attach)):
        raise ManifestError(
            f"pretrained.attach: must be {n_layers} different layers in rising order, as many as model.n_layers, is "
            f"{str(attach)[:80]}"
        )
    wrong = [name for name in pretrained.unfreeze if not _PARAMETER.fullmatch(name)]
    if wrong or len(pretrained.unfreeze) > MAX_UNFROZEN:
        raise ManifestError(f"pretrained.unfreeze: must be up to {MAX_UNFROZEN} beginnings of parameters' names")
    if pretrained.unfreeze and pretrained.dtype != "fp32":
        raise ManifestError(f"pretrained.dtype: must be fp32 where parameters are unfrozen, is {pretrained.dtype}")


def _check_file(file: PretrainedFile) -> None:
    if not _FILE_NAME.fullmatch(file.name):
        raise ManifestError(f"pretrained.files.name: must be a file's name without a folder, is {file.name[:80]!r}")
    if not _SHA256.fullmatch(file.sha256):
        raise ManifestError(f"pretrained.files.sha256: must be 64 hex digits, is {file.sha256[:80]!r}")
    if not 1 <= file.n_bytes <= MAX_FILE_BYTES:
        raise ManifestError(f"pretrained.files.n_bytes: must be from 1 to {MAX_FILE_BYTES}, is {file.n_bytes}")

"""SHA-256 of every file of a folder, in the form that `sha256sum -c` reads."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final

from common.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SUMS: Final = "SHA256SUMS"
MAX_SUMS_BYTES = 16 << 20
_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]{1,100})")


def file_sum(path: Path) -> str:
    """SHA-256 of a file in hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_text(sums: Mapping[str, str]) -> str:
    """The file's text, sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def read_sums(folder: Path) -> dict[str, str]:
    """The hashes that `folder` says its files have, by name. Raises CheckpointError if it does not say."""
    path = folder / SUMS
    data = read_bounded(path, MAX_SUMS_BYTES)
    sums: dict[str, str] = {}
    for line in data.decode("utf-8", "replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(f"{path}: {line[:60]!r} is not a SHA-256 and a name; take the folder again, whole")
        sums[match[2]] = match[1]
    return sums


def check_sums(folder: Path, sums: Mapping[str, str], needed: Iterable[str]) -> None:
    """Raise CheckpointError naming the first file of `sums` that is not as it was written, or one that is `needed`."""
    missing = next((name for name in needed if name not in sums), None)
    if missing is not None:
        raise CheckpointError(f"{folder / SUMS}: does not name {missing}; take the folder again, whole")
    for name, wanted in sums.items():
        try:
            found = file_sum(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {error.strerror or error}") from None
        if found != wanted:
            raise CheckpointError(
                f"{folder / name}: is damaged, it does not have the SHA-256 that {SUMS} says; take it again"
            )


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A file of the folder. Raises CheckpointError if it cannot be read, or has more than `max_bytes`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is not there; name a folder that `export` has written to its end") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: is larger than {max_bytes:,} bytes, the most that is read")
    return data

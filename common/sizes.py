"""Amounts of bytes as people write them: 600MB, 2GB, 1.5 GiB, and 2MB/s for rates."""

from __future__ import annotations

import re

from common.errors import ConfigError

_PREFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]?)(I?)B", re.IGNORECASE)
_RATE = re.compile(r"(.*?) ?/ ?s", re.IGNORECASE)


def parse_size(flag: str, text: str) -> int | None:
    """Bytes, None for an empty text; raises ConfigError naming the flag."""
    if not text:
        return None
    return _bytes(flag, text, text, "600MB or 2GB")


def parse_rate(flag: str, text: str) -> int | None:
    """Bytes a second, None for an empty text; raises ConfigError naming the flag."""
    if not text:
        return None
    match = _RATE.fullmatch(text.strip())
    return _bytes(flag, text, match[1] if match else "", "2MB/s or 500KB/s")


def size_text(n_bytes: float) -> str:
    """Format a size in whole megabytes, which `parse_size` can read."""
    return f"{n_bytes / 1e6:,.0f} MB"


def _bytes(flag: str, text: str, amount: str, examples: str) -> int:
    match = _SIZE.fullmatch(amount.strip())
    if match is None:
        raise ConfigError(f"{flag}: is {text[:40]!r}, must be such as {examples}")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** _PREFIXES[match[2].upper()])

"""How many tokens there can be, and what the tokenizer is called that needs no file."""

from __future__ import annotations

from typing import Final

BYTES: Final = "bytes"
"""The tokenizer whose tokens are bytes."""

BYTE_VALUES: Final = 256
MAX_VOCABULARY: Final = 262_144
MAX_TOKENIZER_BYTES: Final = 64 << 20
"""The largest file of a tokenizer that is read; those of large language models take up to 35 MB."""

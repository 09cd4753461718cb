"""How the tokenizer of a GGUF file splits text before it looks pieces up: the file has no more of that than a name.

The names are llama.cpp's, from `tokenizer.ggml.pre`. The library `transformers` knows some of them, and reads all other
byte-level tokenizers as GPT-2's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from common.text import printable

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

KEY: Final = "tokenizer.ggml.pre"
DIGITS_APART: Final = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
)
"""Each digit is a piece, and what is between them is split as GPT-2 does."""

AS_GPT2: Final = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "roberta-bpe"})
MAX_SHOWN_CHARS: Final = 60


def restore_splits(tokenizer: Tokenizer, path: Path) -> None:
    """Have a tokenizer that the library has read from the GGUF file at `path` split text as that file names it.

    A name that nobody here knows is told in a warning, and changes nothing. Raises what the library does for a file
    that it cannot read.
    """
    from transformers.integrations.gguf.reader import read_gguf_metadata  # noqa: PLC0415 - few runs need it

    name = read_gguf_metadata(str(path))[0].get(KEY, "default")
    splits = tokenizer.pre_tokenizer
    if not isinstance(splits, ByteLevel) or not splits.use_regex or name in AS_GPT2:
        return
    if name in DIGITS_APART:
        tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        return
    logger.warning(
        "%s: its tokenizer splits text as %s does, which is not known here, and is read as GPT-2's: some texts become "
        "other tokens than the model was trained on",
        path,
        printable(str(name))[:MAX_SHOWN_CHARS],
    )

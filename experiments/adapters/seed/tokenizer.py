"""Text to the seed model's tokens and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.errors import DataError
from experiments.adapters.seed.package import optional_package

if TYPE_CHECKING:
    from experiments.adapters.seed.package import SeedFile

PRE_TOKENIZER = "smollm"
"""Digits one by one, then GPT-2's pattern: the only way of cutting words that is built here."""


class SeedTokenizer:
    """Byte-level pair encoding with the file's vocabulary and merges; every text encodes and comes back the same."""

    def __init__(self, file: SeedFile) -> None:
        if file.field("tokenizer.ggml.pre") != PRE_TOKENIZER:
            raise DataError(f"tokenizer.ggml.pre: is {file.field('tokenizer.ggml.pre')!r}, must be {PRE_TOKENIZER!r}")
        self._tokenizer = _byte_level(
            vocabulary={token: number for number, token in enumerate(file.field("tokenizer.ggml.tokens"))},
            merges=[tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")],
        )

    def encode(self, text: str) -> list[int]:
        """Token numbers; nothing is added before or after, and no piece of a text is a control token."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""
        return str(self._tokenizer.decode(ids))


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> Any:  # noqa: ANN401 - tokenizers.Tokenizer
    library = optional_package("tokenizers")
    cut = library.pre_tokenizers
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = cut.Sequence(
        [cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer

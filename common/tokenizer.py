"""What a token is: a byte, or a piece of text that a tokenizer's file names.

The file is that of the library `tokenizers`, as Hugging Face models have it; a run names it
by its SHA-256, so that every trainer of the run cuts text alike.
"""

# Shapes in names: L tokens of a text.

from __future__ import annotations

from codecs import getincrementaldecoder
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from common.assets import asset_of
from common.errors import DataError
from common.vocabulary import BYTE_VALUES, BYTES, MAX_VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Sequence


Tokens = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]
"""Ids of tokens, in the smallest of uint8, uint16 and uint32 that holds the vocabulary."""


class TextStream(Protocol):
    """Text of tokens that come one by one."""

    def add(self, token: int) -> str:
        """Return what `token` completes; empty where a character is not whole yet."""

    def end(self) -> str:
        """Return what is left where no token follows: replacement characters, if anything."""


class Tokenizer(Protocol):
    """Cuts text into tokens, and puts it together again."""

    @property
    def name(self) -> str:
        """What the manifest calls it."""

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; ids lie below."""

    def encode(self, texts: Sequence[bytes]) -> list[Tokens]:
        """Tokens of each text. What is not UTF-8 is read as replacement characters, unless tokens are bytes."""

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Text of tokens, as bytes, which need not be UTF-8 where tokens are bytes."""

    def stream(self) -> TextStream:
        """Text of tokens that are still to come; bytes that are not UTF-8 become replacement characters."""


class ByteTokenizer:
    """A token is a byte."""

    name: Final = BYTES
    vocab_size: Final = BYTE_VALUES

    def encode(self, texts: Sequence[bytes]) -> list[Tokens]:
        """Bytes of each text."""
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Put bytes together."""
        return bytes(tokens)

    def stream(self) -> TextStream:
        """Characters of bytes that are still to come."""
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(bytes((token,)))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class FileTokenizer:
    """The tokenizer whose file has the bytes `data`; raises DataError if it is none, or has too many tokens."""

    def __init__(self, data: bytes, where: str) -> None:
        self._library = _parsed(data, where)
        self.name = asset_of(data).sha256
        self.vocab_size = 1 + max(self._library.get_vocab().values(), default=-1)
        if not 1 < self.vocab_size <= MAX_VOCABULARY:
            raise DataError(f"{where}: has {self.vocab_size:,} tokens; a run can have 2 to {MAX_VOCABULARY:,}.")
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, texts: Sequence[bytes]) -> list[Tokens]:
        """Tokens of each text, without special ones around it."""
        decoded = [text.decode("utf-8", "replace") for text in texts]
        encodings = self._library.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Text of tokens, special ones included."""
        return self._library.decode(list(tokens), skip_special_tokens=False).encode("utf-8")

    def stream(self) -> TextStream:
        """Text of tokens that are still to come."""
        return _FileStream(self._library)


class _FileStream:
    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = library
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []

    def add(self, token: int) -> str:
        text = self._stream.step(self._library, token) or ""
        self._held = [] if text else [*self._held, token]
        return text

    def end(self) -> str:
        return self._library.decode(self._held, skip_special_tokens=False)


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest type that holds every token of a vocabulary."""
    return np.dtype(np.min_scalar_type(vocab_size - 1))


def _parsed(data: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_buffer(data)
    except ValueError as error:
        problem = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise DataError(
            f"{where}: is no tokenizer.json that the library tokenizers {tokenizers.__version__} reads: {problem}"
        ) from None
    # A file may ask for both, and neither is for a corpus: texts would be cut short or filled up.
    library.no_truncation()
    library.no_padding()
    return library

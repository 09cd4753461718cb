"""A tokenizer of a corpus's own: byte-level pairs (BPE, arXiv 1508.07909), trained by the library `tokenizers`.

Before the path of a step. Only the training part is read, so that held-out text stays unseen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.errors import ConfigError, DataError
from common.vocabulary import BYTE_VALUES, MAX_VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from node.data.dataset import TextDataset

PIECE_BYTES: Final = 1 << 16
MAX_BYTES: Final = 256 << 20
"""Of a larger text, pieces from all over it are read: the most frequent pairs are known long before."""


def train_tokenizer(
    dataset: TextDataset, vocab_size: int, *, stopped: Callable[[], bool], show_progress: bool = False
) -> bytes:
    """Return the file of a tokenizer with up to `vocab_size` tokens, for a `dataset` whose tokens are bytes.

    Every text can be cut and is put together again as it was. A text without so many pairs that occur twice gives fewer
    tokens. Raises ConfigError for a vocabulary out of range, DataError once `stopped`.
    """
    if not BYTE_VALUES < vocab_size <= MAX_VOCABULARY:
        raise ConfigError(
            f"a tokenizer that is trained has {BYTE_VALUES + 1} to {MAX_VOCABULARY:,} tokens, {vocab_size:,} cannot be"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(_pieces(dataset, stopped), trainer)
    return tokenizer.to_str().encode("utf-8")


def _pieces(dataset: TextDataset, stopped: Callable[[], bool]) -> Iterator[str]:
    n_pieces = -(-len(dataset.train) // PIECE_BYTES)
    n_read = min(n_pieces, MAX_BYTES // PIECE_BYTES)
    for number in range(n_read):
        if stopped():
            raise DataError("the training of a tokenizer was stopped")
        start = number * n_pieces // n_read * PIECE_BYTES
        # A character that is cut in two is left out, as it is no text on either side.
        yield dataset.train[start : start + PIECE_BYTES].tobytes().decode("utf-8", "ignore")

"""A tokenizer of a few hundred tokens, trained on a few sentences, as the file that people have."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = ["the swarm trains many tiny experts, and each of them learns a little\n\n" * 3]


@cache
def tiny_tokenizer(n_tokens: int = 300) -> bytes:
    """Byte-level pairs: every text can be cut by it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str().encode("utf-8")

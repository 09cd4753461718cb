"""A run's tokenizer as the files that transformers reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.vocabulary import BYTE_VALUES
from node.trainer.exported.layout import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from node.model.pretrained_tokens import PretrainedTokens

PADDING_BYTE: Final = 0
"""Fills up a batch of texts where tokens are bytes. It is a token like any other, so it has to be masked."""


def byte_tokenizer() -> bytes:
    """A `tokenizer.json` whose ids are the values of a text's bytes in UTF-8; ids that are not UTF-8 give U+FFFD."""
    names = byte_names()
    library = Tokenizer(models.BPE(vocab={name: value for value, name in enumerate(names)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library.to_str(pretty=True).encode("utf-8")


def byte_names() -> list[str]:
    """The characters that stand for bytes in a vocabulary, by value: the library's, which does not say which is which.

    A character of Latin-1 that is printed stands for its own byte; the others follow in the order of the bytes.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter([letter for letter in letters if ord(letter) >= BYTE_VALUES])
    own = {ord(letter) for letter in letters if ord(letter) < BYTE_VALUES}
    return [chr(value) if value in own else next(others) for value in range(BYTE_VALUES)]


def tokenizer_files(
    run_file: bytes | None, context: int, pretrained: PretrainedTokens | None = None
) -> dict[str, bytes]:
    """The files by name: from the run's own `tokenizer.json`, or, without one, for a run whose tokens are bytes.

    `context` are the most tokens that the model reads at once. `pretrained` is what is known of the tokens of the model
    that the run is built around.
    """
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    if pretrained is not None:
        config |= _of_pretrained(pretrained)
    if run_file is None:
        # Only so is a text that holds the padding's character read as text.
        config |= {"pad_token": byte_names()[PADDING_BYTE], "split_special_tokens": True}
    data = byte_tokenizer() if run_file is None else _plain(run_file)
    return {TOKENIZER: data, TOKENIZER_CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _of_pretrained(tokens: PretrainedTokens) -> dict[str, object]:
    extra = {"extra_special_tokens": list(tokens.extra_special)} if tokens.extra_special else {}
    template = {} if tokens.chat_template is None else {CHAT_TEMPLATE: tokens.chat_template}
    return {**tokens.special, **extra, **template}


def _plain(run_file: bytes) -> bytes:
    """The run's file, cutting text as the run does: without special tokens around it, whole and without padding."""
    table = json.loads(run_file)
    library = Tokenizer.from_buffer(run_file)
    adds_tokens = bool(library.num_special_tokens_to_add(is_pair=False))
    if not adds_tokens and not table.get("truncation") and not table.get("padding"):
        return run_file
    table |= {"truncation": None, "padding": None}
    if adds_tokens:
        table["post_processor"] = None
    return (json.dumps(table, ensure_ascii=False, indent=2) + "\n").encode("utf-8")

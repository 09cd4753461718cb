"""A corpus in tokens: the same documents are held out, each tokenizer has a cache of its own, losses compare."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from common.tokenizer import FileTokenizer
from node.data import TextDataset, open_dataset
from node.data.eviction import stored_corpora
from node.data.train_tokenizer import train_tokenizer
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from common.tokenizer import Tokenizer

TOKENIZER = FileTokenizer(tiny_tokenizer(), "tiny")
TEXTS = [f"document {i}: the swarm trains many tiny experts, naïve {'and each learns ' * (i % 7)}" for i in range(120)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in TEXTS), encoding="utf-8")
    return path


def opened(text: Path, tokenizer: Tokenizer | None) -> TextDataset:
    return open_dataset(text, cache_dir=text.parent / "cache", held_out_fraction=0.2, tokenizer=tokenizer)


def test_tokens_stand_for_the_same_text_as_bytes(text: Path) -> None:
    in_bytes, in_tokens = opened(text, None), opened(text, TOKENIZER)
    assert in_tokens.train.dtype == np.uint16
    assert TOKENIZER.decode(in_tokens.train.tolist()) == in_bytes.train.tobytes()
    assert TOKENIZER.decode(in_tokens.held_out.tolist()) == in_bytes.held_out.tobytes()
    assert in_tokens.index.content == in_bytes.index.content


def test_bytes_and_tokens_are_counted(text: Path) -> None:
    in_bytes, in_tokens = opened(text, None), opened(text, TOKENIZER)
    assert in_bytes.train_bytes_per_token == in_bytes.held_out_bytes_per_token == 1.0
    assert in_tokens.index.train_bytes == in_bytes.index.train_bytes == len(in_bytes.train)
    assert in_tokens.index.train_tokens == len(in_tokens.train)
    assert in_tokens.train_bytes_per_token == len(in_bytes.train) / len(in_tokens.train) > 2
    assert in_tokens.held_out_bytes_per_token == len(in_bytes.held_out) / len(in_tokens.held_out)
    assert "bytes a token" in in_tokens.describe()
    assert "bytes a token" not in in_bytes.describe()


def test_each_tokenizer_has_a_cache_of_its_own_which_is_found_again(text: Path) -> None:
    for _ in range(2):
        for tokenizer in (None, TOKENIZER, FileTokenizer(tiny_tokenizer(280), "smaller")):
            opened(text, tokenizer)
    assert len(stored_corpora(text.parent / "cache")) == 3


def test_a_cache_whose_tokens_are_cut_short_is_built_again(text: Path) -> None:
    whole = opened(text, TOKENIZER).train.tolist()
    file = stored_corpora(text.parent / "cache")[0].paths[0] / "train.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert opened(text, TOKENIZER).train.tolist() == whole


def test_as_many_held_out_bytes_are_read_as_were_asked_for_whatever_a_token_is(text: Path) -> None:
    in_tokens = opened(text, TOKENIZER)
    windows = sum(len(ids) for ids in in_tokens.held_out_batches(4, 16, 400))
    assert windows * 16 * in_tokens.held_out_bytes_per_token == pytest.approx(400, abs=16 * 4)


def test_batches_hold_tokens_below_the_vocabulary(text: Path) -> None:
    ids_BT = opened(text, TOKENIZER).train_batch(0, shard=0, n_shards=1, batch=4, context=16, seed=0)
    assert ids_BT.shape == (4, 17)
    assert int(ids_BT.max()) >= 256
    assert int(ids_BT.max()) < TOKENIZER.vocab_size


def test_a_tokenizer_that_makes_nothing_of_a_text_is_refused(text: Path) -> None:
    silent = {"version": "1.0", "model": {"type": "BPE", "vocab": {"☃": 0, "☂": 1}, "merges": []}}
    with pytest.raises(DataError, match="The tokenizer makes no tokens of this text"):
        opened(text, FileTokenizer(json.dumps(silent).encode(), "silent"))


# Training one


def test_a_tokenizer_learns_from_the_training_part_and_gives_every_text_back(text: Path) -> None:
    dataset = opened(text, None)
    file = train_tokenizer(dataset, 300, stopped=lambda: False)
    assert train_tokenizer(dataset, 300, stopped=lambda: False) == file
    tokenizer, unseen = FileTokenizer(file, "trained"), "  the\tswarm é\n\n".encode()
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode([unseen])[0].tolist()) == unseen
    assert opened(text, tokenizer).train_bytes_per_token > 1.5


def test_a_text_without_so_many_pairs_gives_fewer_tokens(text: Path) -> None:
    file = train_tokenizer(opened(text, None), 5000, stopped=lambda: False)
    assert 256 < FileTokenizer(file, "trained").vocab_size < 5000


@pytest.mark.parametrize("vocab_size", [0, 256, 262_145])
def test_a_vocabulary_out_of_range_is_not_trained(text: Path, vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=r"has 257 to 262,144 tokens"):
        train_tokenizer(opened(text, None), vocab_size, stopped=lambda: False)


def test_a_training_that_is_stopped_ends(text: Path) -> None:
    with pytest.raises(DataError, match="was stopped"):
        train_tokenizer(opened(text, None), 300, stopped=lambda: True)

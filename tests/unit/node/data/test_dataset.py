"""A corpus is split and cached once; batches are a function of their arguments."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, DataError, InvalidInputError
from common.folders import data_cache_bytes
from node.data import TextDataset, open_dataset
from node.data import cache as cache_module
from node.data import sources as sources_module
from node.data.cache import SEPARATOR, held_out_hash
from node.data.eviction import stored_corpora
from node.data.shuffle import keys_of, shuffled
from node.trainer.cache_command import run_cache
from node.trainer.config import CacheConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def write_json_lines(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


def articles(n: int = 200) -> list[str]:
    return [f"Article {i}: " + f"fact {i * i} of many. " * (3 + i % 5) for i in range(n)]


@pytest.fixture
def dataset(tmp_path: Path) -> TextDataset:
    path = write_json_lines(tmp_path / "corpus.jsonl", articles())
    return open_dataset(path, cache_dir=tmp_path / "cache", held_out_fraction=0.2, seed=0)


def split_back(part: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.uint8]]) -> list[bytes]:
    joined = bytes(part)
    assert joined.endswith(SEPARATOR)
    return joined.removesuffix(SEPARATOR).split(SEPARATOR)


# The split


def test_every_document_is_in_exactly_one_part_and_the_counts_say_so(dataset: TextDataset) -> None:
    train, held_out = split_back(dataset.train), split_back(dataset.held_out)
    assert sorted(train + held_out) == sorted(article.strip("\n").encode() for article in articles())
    index = dataset.index
    assert (index.train_documents, index.held_out_documents) == (len(train), len(held_out))
    assert (index.train_bytes, index.held_out_bytes) == (len(dataset.train), len(dataset.held_out))
    assert 20 <= len(held_out) <= 60  # 40 expected of 200


def test_what_is_held_out_depends_on_content_not_on_order_or_neighbours(tmp_path: Path, dataset: TextDataset) -> None:
    more = [*reversed(articles()), *(f"another document {i}" for i in range(50))]
    path = write_json_lines(tmp_path / "more.jsonl", more)
    other = open_dataset(path, cache_dir=tmp_path / "cache", held_out_fraction=0.2)
    originals = {article.encode() for article in articles()}
    assert set(split_back(other.held_out)) & originals == set(split_back(dataset.held_out))


def test_another_seed_holds_out_other_documents(tmp_path: Path, dataset: TextDataset) -> None:
    other = open_dataset(tmp_path / "corpus.jsonl", cache_dir=tmp_path / "cache", held_out_fraction=0.2, seed=1)
    assert set(split_back(other.held_out)) != set(split_back(dataset.held_out))


def test_the_hash_of_a_document_is_pinned() -> None:
    # A change would silently move documents of old runs between their two parts.
    assert held_out_hash(b"Kilohive", 0) == 10132339201408347521
    assert held_out_hash(b"Kilohive", 1) != held_out_hash(b"Kilohive", 0)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_two_documents_are_enough_for_one_on_each_side(tmp_path: Path, fraction: float) -> None:
    path = write_json_lines(tmp_path / "two.jsonl", ["the first document", "the second document"])
    dataset = open_dataset(path, cache_dir=tmp_path / "cache", held_out_fraction=fraction)
    assert (dataset.index.train_documents, dataset.index.held_out_documents) == (1, 1)
    assert sorted([bytes(dataset.train), bytes(dataset.held_out)]) == [
        b"the first document\n\n",
        b"the second document\n\n",
    ]


@pytest.mark.parametrize("documents", [[], ["", " \n"], ["alone"], ["same", "same", "same"]])
def test_fewer_than_two_different_documents_cannot_be_split(tmp_path: Path, documents: list[str]) -> None:
    path = write_json_lines(tmp_path / "few.jsonl", documents)
    with pytest.raises(DataError, match=r"fewer than two different documents.*give more text"):
        open_dataset(path, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.building"))


# The cache


def test_the_second_start_maps_the_cache_and_reads_no_source(
    tmp_path: Path, dataset: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "_read_file", None)  # reading a document would now be a TypeError
    again = open_dataset(tmp_path / "corpus.jsonl", cache_dir=tmp_path / "cache", held_out_fraction=0.2)
    assert isinstance(again.train, np.memmap)
    assert bytes(again.train) == bytes(dataset.train)


def test_a_changed_source_replaces_the_cache_while_old_readers_keep_theirs(
    tmp_path: Path, dataset: TextDataset
) -> None:
    before = bytes(dataset.train)
    path = write_json_lines(tmp_path / "corpus.jsonl", [article.upper() for article in articles()])
    os.utime(path, ns=(1, 1))  # same size: only the time tells
    changed = open_dataset(path, cache_dir=tmp_path / "cache", held_out_fraction=0.2)
    assert b"ARTICLE" in bytes(changed.train)
    assert bytes(dataset.train) == before
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1


@pytest.mark.parametrize("damage", ["truncate", "no index", "bad index", "other index", "no bytes"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, dataset: TextDataset, damage: str) -> None:
    before = bytes(dataset.train)
    (folder,) = (entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir())
    if damage == "truncate":
        os.truncate(folder / "train.bin", 100)
    elif damage == "no bytes":
        (folder / "held_out.bin").unlink()
    elif damage == "no index":
        (folder / "index.json").unlink()
    else:
        (folder / "index.json").write_text("{" if damage == "bad index" else '{"unknown": 1}', encoding="utf-8")
    again = open_dataset(tmp_path / "corpus.jsonl", cache_dir=tmp_path / "cache", held_out_fraction=0.2)
    assert bytes(again.train) == before


def test_a_build_that_was_cut_off_leaves_nothing_that_the_next_one_trusts(tmp_path: Path) -> None:
    path, cache = write_json_lines(tmp_path / "corpus.jsonl", articles()), tmp_path / "cache"
    whole = bytes(open_dataset(path, cache_dir=cache).train)
    (folder,) = (entry for entry in cache.iterdir() if entry.is_dir())
    folder.rename(folder.with_name(f"{folder.name}.building"))
    os.truncate(cache / f"{folder.name}.building" / "train.bin", 7)
    assert bytes(open_dataset(path, cache_dir=cache).train) == whole
    assert not list(cache.glob("*.building"))


def test_a_corpus_is_built_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock_is_taken() -> bool:
        (lock,) = (tmp_path / "cache").glob("*.lock")
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    build, taken = cache_module._build, []

    def watched(*args: Any) -> Any:
        taken.append(lock_is_taken())
        return build(*args)

    monkeypatch.setattr(cache_module, "_build", watched)
    open_dataset(write_json_lines(tmp_path / "corpus.jsonl", articles()), cache_dir=tmp_path / "cache")
    assert taken == [True]
    assert not lock_is_taken()


def test_processes_that_open_a_corpus_at_once_all_get_the_whole_of_it(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "corpus.jsonl", articles(2000))
    code = (
        "import sys, zlib, pathlib; from node.data import open_dataset; "
        "d = open_dataset(pathlib.Path(sys.argv[1]), cache_dir=pathlib.Path(sys.argv[2])); "
        "print(zlib.crc32(d.train), zlib.crc32(d.held_out))"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert len(set(said)) == 1
    assert len(said[0].split()) == 2


def test_a_cache_that_cannot_be_written_is_one_clear_sentence(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "corpus.jsonl", articles())
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"data cache in .*file/cache cannot be written: Not a directory"):
        open_dataset(path, cache_dir=tmp_path / "file" / "cache")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_is_one_clear_sentence_and_leaves_no_half_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_json_lines(tmp_path / "corpus.jsonl", articles()), tmp_path / "cache"
    make = type(cache).mkdir

    def mkdir_on_a_full_disk(self: Path, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False) -> None:
        make(self, mode, parents=parents, exist_ok=exist_ok)
        if self.name.endswith(".building"):
            (self / "train.bin").symlink_to("/dev/full")

    monkeypatch.setattr(type(cache), "mkdir", mkdir_on_a_full_disk)
    with pytest.raises(DataError, match=r"No space left on device\. Free space there"):
        open_dataset(path, cache_dir=cache)
    assert [entry.name for entry in cache.iterdir() if entry.is_dir()] == []
    monkeypatch.undo()
    assert open_dataset(path, cache_dir=cache).index.train_documents > 150


# The bound of the cache


def corpus_of(folder: Path, name: str, used_s: int) -> TextDataset:
    path = write_json_lines(folder / f"{name}.jsonl", articles())
    dataset = open_dataset(path, cache_dir=folder / "cache")
    (index,) = (folder / "cache").glob(f"{name}-jsonl-*/index.json")
    os.utime(index, (used_s, used_s))
    return dataset


def cached(folder: Path) -> list[str]:
    return sorted(stored.name.split("-")[0] for stored in stored_corpora(folder / "cache"))


def test_what_was_used_longest_ago_goes_first_and_never_what_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "somebody-elses").mkdir()
    for name, used_s in (("second", 200), ("third", 300)):
        corpus_of(tmp_path, name, used_s)
    in_use = corpus_of(tmp_path, "first", 100)
    size = stored_corpora(tmp_path / "cache")[0].n_bytes
    monkeypatch.setenv("KILOHIVE_CACHE_MAX_SIZE", f"{3.5 * size / 1000:.3f}KB")
    corpus_of(tmp_path, "fourth", 400)
    assert cached(tmp_path) == ["first", "fourth", "third"]
    corpus_of(tmp_path, "third", 500)  # used again
    corpus_of(tmp_path, "fifth", 600)
    assert cached(tmp_path) == ["fifth", "first", "third"]
    assert bytes(in_use.train)
    del in_use
    corpus_of(tmp_path, "sixth", 700)
    assert cached(tmp_path) == ["fifth", "sixth", "third"]
    assert (tmp_path / "cache" / "somebody-elses").is_dir()


def test_a_corpus_larger_than_the_bound_is_still_there_for_who_opened_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE_MAX_SIZE", "1KB")
    assert corpus_of(tmp_path, "large", 100).index.train_documents > 150
    assert cached(tmp_path) == ["large"]


def test_the_cache_has_a_bound_unless_it_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_cache_bytes() == 10_000_000_000
    for text, n_bytes in (("2GB", 2_000_000_000), ("0", 0), ("", 10_000_000_000)):
        monkeypatch.setenv("KILOHIVE_CACHE_MAX_SIZE", text)
        assert data_cache_bytes() == n_bytes
    monkeypatch.setenv("KILOHIVE_CACHE_MAX_SIZE", "much")
    with pytest.raises(ConfigError, match="KILOHIVE_CACHE_MAX_SIZE: is 'much', must be such as 600MB or 2GB"):
        data_cache_bytes()


async def test_the_cache_is_shown_and_emptied_but_for_what_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("KILOHIVE_CACHE", str(cache))
    await run_cache(CacheConfig(), asyncio.Event())
    assert f"{cache}: 0 corpora, 0 B of at most 10 GB (KILOHIVE_CACHE_MAX_SIZE)\n" in capsys.readouterr().out
    corpus_of(tmp_path, "old", 100)
    used = corpus_of(tmp_path, "used", 200)
    left = cache / "half-0123456789ab.building"  # by a build that was killed
    left.mkdir()
    (left / "train.bin").write_bytes(b"x" * 1000)
    await run_cache(CacheConfig(), asyncio.Event())
    shown = capsys.readouterr().out
    assert f"{cache}: 3 corpora, " in shown
    assert [line.endswith("in use") for line in shown.splitlines() if "used-jsonl-" in line] == [True]
    assert [line.endswith("in use") for line in shown.splitlines() if "old-jsonl-" in line] == [False]
    await run_cache(CacheConfig(clear=True), asyncio.Event())
    assert ": deleted 2 of 3 corpora, " in (said := capsys.readouterr().out)
    assert said.splitlines()[0].endswith("; 1 in use stay")
    assert cached(tmp_path) == ["used"]
    del used
    await run_cache(CacheConfig(clear=True), asyncio.Event())
    assert ": deleted 1 of 1 corpora, " in capsys.readouterr().out
    assert cached(tmp_path) == []


# Batches


def train_batch(dataset: TextDataset, step: int, shard: int = 0, n_shards: int = 1, batch: int = 4) -> torch.Tensor:
    return dataset.train_batch(step, shard=shard, n_shards=n_shards, batch=batch, context=16, seed=3)


def starts_of(dataset: TextDataset, ids_BT1: torch.Tensor) -> list[int]:
    """Where each window of the batch lies in the training tokens."""
    text = bytes(dataset.train)
    windows = [bytes(row) for row in ids_BT1.tolist()]
    found = [[i for i in range(0, len(text) - 16, 16) if text[i : i + 17] == window] for window in windows]
    return [places[0] for places in found]


def unique_dataset(tmp_path: Path) -> TextDataset:
    """No two windows of 16 bytes are alike, so that a window tells where it came from."""
    path = write_json_lines(tmp_path / "unique.jsonl", [f"{i:08d}" * 2 for i in range(60)])
    return open_dataset(path, cache_dir=tmp_path / "cache", held_out_fraction=0.1)


def test_a_batch_is_int64_bytes_with_one_more_than_the_context(dataset: TextDataset) -> None:
    ids = train_batch(dataset, 0)
    assert ids.dtype == torch.int64
    assert ids.shape == (4, 17)
    assert bytes(ids[0].tolist()) in bytes(dataset.train)


def test_a_step_reads_the_same_whenever_and_in_whatever_order_it_is_asked_for(
    tmp_path: Path, dataset: TextDataset
) -> None:
    straight = [train_batch(dataset, step) for step in range(20)]
    resumed = open_dataset(tmp_path / "corpus.jsonl", cache_dir=tmp_path / "cache", held_out_fraction=0.2)
    for step in (13, 2, 19, 0):
        assert torch.equal(train_batch(resumed, step), straight[step])


def test_an_epoch_meets_every_window_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    dataset = unique_dataset(tmp_path)
    n_windows = (len(dataset.train) - 1) // 16
    drawn = torch.cat([train_batch(dataset, step, batch=1) for step in range(2 * n_windows)])
    starts = starts_of(dataset, drawn)
    first, second = starts[:n_windows], starts[n_windows:]
    assert sorted(first) == sorted(second) == [16 * i for i in range(n_windows)]
    assert first != second
    assert first != sorted(first)


def test_batches_that_straddle_epochs_are_the_same_windows(tmp_path: Path) -> None:
    dataset = unique_dataset(tmp_path)
    one_by_one = torch.cat([train_batch(dataset, step, batch=1) for step in range(210)])
    by_seven = torch.cat([train_batch(dataset, step, batch=7) for step in range(30)])
    assert torch.equal(one_by_one, by_seven)


def test_shards_share_no_window_and_together_hold_all(tmp_path: Path) -> None:
    dataset = unique_dataset(tmp_path)
    n_windows = (len(dataset.train) - 1) // 16
    seen: list[set[int]] = []
    for shard in range(3):
        drawn = [train_batch(dataset, step, shard, 3) for step in range(n_windows)]  # several epochs
        seen.append(set(starts_of(dataset, torch.cat(drawn))))
    assert sum(map(len, seen)) == n_windows
    assert set.union(*seen) == {16 * i for i in range(n_windows)}


def test_seed_shard_and_epoch_each_change_the_order(dataset: TextDataset) -> None:
    args = {"n_shards": 1, "batch": 8, "context": 16}
    base = dataset.train_batch(0, shard=0, seed=0, **args)
    assert not torch.equal(base, dataset.train_batch(0, shard=0, seed=1, **args))
    assert not torch.equal(base, dataset.train_batch(1, shard=0, seed=0, **args))
    epochs = np.arange(4, dtype=np.uint64)
    keys = [keys_of(seed, shard, epochs).tolist() for seed in range(3) for shard in range(3)]
    assert len({key for row in keys for key in row}) == 36


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 700), seed=st.integers(0, 2**53), shard=st.integers(0, 50), epoch=st.integers(0, 1000))
def test_the_shuffle_is_a_permutation(n: int, seed: int, shard: int, epoch: int) -> None:
    keys = keys_of(seed, shard, np.full(n, epoch, dtype=np.uint64))
    assert sorted(shuffled(np.arange(n, dtype=np.uint64), n, keys).tolist()) == list(range(n))


def test_the_shuffle_spreads_evenly_and_forgets_neighbours() -> None:
    n = 5000
    keys = keys_of(1, 0, np.zeros(n, dtype=np.uint64))
    places = shuffled(np.arange(n, dtype=np.uint64), n, keys).astype(np.float64)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(n), places)[0, 1]) < 0.05
    quarter = np.histogram(places[: n // 4], bins=10, range=(0, n))[0]
    assert quarter.min() > 90  # 125 expected in each tenth
    assert quarter.max() < 160


def test_held_out_windows_are_in_order_do_not_overlap_and_are_the_same_each_time(dataset: TextDataset) -> None:
    batches = list(dataset.held_out_batches(8, 16))
    n_windows = (len(dataset.held_out) - 1) // 16
    windows = torch.cat(batches)
    assert windows.shape == (n_windows, 17)
    assert all(len(batch) == 8 for batch in batches[:-1])
    assert bytes(windows[:, 1:].flatten().tolist()) == bytes(dataset.held_out[1 : 1 + 16 * n_windows])
    assert torch.equal(torch.cat(list(dataset.held_out_batches(3, 16))), windows)


def test_a_limit_on_held_out_bytes_takes_windows_from_all_over(dataset: TextDataset) -> None:
    every = torch.cat(list(dataset.held_out_batches(8, 16)))
    some = torch.cat(list(dataset.held_out_batches(8, 16, max_bytes=160)))
    assert len(some) == 10
    assert torch.equal(some[5], every[5 * len(every) // 10])
    assert len(torch.cat(list(dataset.held_out_batches(8, 16, max_bytes=1)))) == 1
    assert torch.equal(torch.cat(list(dataset.held_out_batches(8, 16, max_bytes=10**9))), every)


def test_a_corpus_too_short_for_the_context_or_the_shards_says_so(dataset: TextDataset) -> None:
    n_bytes = len(dataset.train)
    with pytest.raises(DataError, match=f"{n_bytes} training tokens.*too few for 1 trainers.*shorter context"):
        dataset.train_batch(0, shard=0, n_shards=1, batch=1, context=n_bytes, seed=0)
    with pytest.raises(DataError, match="too few for 100000 trainers"):
        dataset.train_batch(0, shard=99_999, n_shards=100_000, batch=1, context=16, seed=0)
    with pytest.raises(DataError, match="fewer than one window"):
        dataset.held_out_batches(1, n_bytes)


def test_impossible_arguments_name_the_field(dataset: TextDataset) -> None:
    with pytest.raises(InvalidInputError, match="batch: is 0"):
        train_batch(dataset, 0, batch=0)
    with pytest.raises(InvalidInputError, match=r"shard, step: are 2, 0; shard is in \[0, 2\)"):
        train_batch(dataset, 0, shard=2, n_shards=2)
    with pytest.raises(InvalidInputError, match="step 0 or more"):
        train_batch(dataset, -1)
    with pytest.raises(InvalidInputError, match="context: is -3"):
        dataset.held_out_batches(1, -3)

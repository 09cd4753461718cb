"""A file is known by what it holds; what was damaged on the disk counts as missing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from common.assets import Asset, AssetStore, asset_of, asset_store, read_file
from common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> AssetStore:
    return AssetStore(tmp_path / "assets")


def test_what_is_kept_is_found_by_its_hash(store: AssetStore) -> None:
    asset = store.add(b"tokens")
    assert asset == asset_of(b"tokens")
    assert store.find(asset) == b"tokens"
    assert store.add(b"tokens") == asset
    assert store.find(asset_of(b"other")) is None


@pytest.mark.parametrize("damaged", [b"", b"token", b"tokenS", b"tokens "])
def test_what_was_damaged_is_missing(store: AssetStore, damaged: bytes) -> None:
    asset = store.add(b"tokens")
    store.path(asset).write_bytes(damaged)
    assert store.find(asset) is None
    store.add(b"tokens")
    assert store.find(asset) == b"tokens"


def test_another_size_is_another_asset(store: AssetStore) -> None:
    asset = store.add(b"tokens")
    assert store.find(Asset(sha256=asset.sha256, n_bytes=7)) is None


def test_one_process_at_a_time_gathers_a_file(store: AssetStore) -> None:
    asset, other = asset_of(b"tokens"), asset_of(b"other")
    with store.gathering(asset) as first, store.gathering(asset) as second, store.gathering(other) as third:
        assert (first, second, third) == (True, False, True)
    with store.gathering(asset) as again:
        assert again


def test_a_file_is_copied_whatever_another_process_gathers_of_it(store: AssetStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"tokens")
    asset = asset_of(b"tokens")
    store.gather(asset, b"to")
    assert store.add_file(tmp_path / "file") == asset
    assert store.find(asset) == b"tokens"
    assert store.part(asset).read_bytes() == b"to"


def test_the_store_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path))
    asset = asset_store().add(b"tokens")
    assert (tmp_path / "assets" / asset.sha256).read_bytes() == b"tokens"


def test_a_store_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be written: Not a directory.*KILOHIVE_CACHE"):
        AssetStore(tmp_path / "file" / "assets").add(b"tokens")


def test_a_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is larger than 4 bytes"):
        read_file(path, 4)
    os.truncate(path, 1 << 40)  # takes no room on the disk, and is not read
    with pytest.raises(ConfigError, match="is larger than 64 bytes"):
        read_file(path, 64)
    with pytest.raises(ConfigError, match="gone: cannot be read: No such file"):
        read_file(tmp_path / "gone", 4)

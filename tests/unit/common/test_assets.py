"""A file is known by what it holds; what was damaged on the disk counts as missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.assets import Asset, AssetStore, asset_of, asset_store, assets_in_use, read_file, stored_assets
from common.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from common.assets import Asset, AssetStore
with AssetStore(Path(sys.argv[1])).using([Asset(sha256=sys.argv[2], n_bytes=100)]):
    print("held", flush=True)
    time.sleep(60)
"""


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


# The bound of the store


def bounded(tmp_path: Path, max_bytes: int) -> AssetStore:
    return AssetStore(tmp_path / "assets", max_bytes)


def data(letter: str) -> bytes:
    return letter.encode() * 100


def add(store: AssetStore, letter: str, used_s: int) -> Asset:
    asset = store.add(data(letter))
    os.utime(store.path(asset), (used_s, used_s))
    return asset


def kept(tmp_path: Path, letters: str) -> str:
    """Those of `letters` whose data are still there."""
    return "".join(letter for letter in letters if (tmp_path / "assets" / asset_of(data(letter)).sha256).exists())


def test_what_was_used_longest_ago_goes_and_never_what_is_in_use(tmp_path: Path) -> None:
    store = bounded(tmp_path, 250)
    first = add(store, "a", 100)
    add(store, "b", 200)
    with store.using([first]):
        os.utime(store.path(first), (100, 100))
        add(store, "c", 300)
        assert kept(tmp_path, "abc") == "ac"
    assert store.path(first).stat().st_mtime > 1000  # it was in use until now
    add(store, "d", 400)
    assert kept(tmp_path, "abcd") == "ad"
    assert store.find(first) == data("a")


def test_an_asset_larger_than_the_bound_is_there_for_as_long_as_it_is_in_use(tmp_path: Path) -> None:
    store, asset = bounded(tmp_path, 50), asset_of(data("a"))
    with store.using([asset]):
        store.add(data("a"))
        store.add(b"b")
        assert store.holds(asset)
    store.add(b"c")
    assert not store.holds(asset)


def test_what_is_fetched_now_stays_and_what_was_fetched_in_part_goes(tmp_path: Path) -> None:
    store, fetched = bounded(tmp_path, 50), asset_of(b"fetched")
    store.gather(fetched, b"fet")
    with store.gathering(fetched) as alone:
        assert alone
        store.add(data("a"))
        assert store.part(fetched).exists()
        store.gather(fetched, b"ched")
        assert store.adopt(fetched)
    assert store.find(fetched) == b"fetched"
    store.gather(asset_of(b"half"), b"ha")
    os.utime(store.part(asset_of(b"half")), (100, 100))
    store.add(data("b"))
    assert not store.part(asset_of(b"half")).exists()


def test_a_model_that_is_being_copied_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = bounded(tmp_path, 50), bounded(tmp_path, 50)
    (tmp_path / "weights").write_bytes(data("w"))
    copy = shutil.copyfile

    def copied_while_another_process_adds(source: Path, target: Path) -> Path:
        copy(source, target)
        other.add(b"z" * 60)
        return target

    monkeypatch.setattr(shutil, "copyfile", copied_while_another_process_adds)
    with store.using([asset := asset_of(data("w"))]):
        assert store.add_file(tmp_path / "weights") == asset
        assert store.find(asset) == data("w")


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    store = bounded(tmp_path, 50)
    with store.using([asset := asset_of(data("a"))]):
        store.add(data("a"))
        arguments = [sys.executable, "-c", HOLD, str(tmp_path / "assets"), asset.sha256]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
    (stored,) = stored_assets(tmp_path / "assets")
    try:
        assert stored.in_use()
        assert not stored.remove()
    finally:
        process.kill()
        process.communicate()
    assert stored.remove()
    assert stored_assets(tmp_path / "assets") == []


def test_everything_of_an_asset_is_counted_and_goes_with_it(tmp_path: Path) -> None:
    store = AssetStore(tmp_path / "assets")
    weights, tokens, alone = (store.add(data(letter)) for letter in "wta")
    folder = store.folder_of({"model.safetensors": weights, "tokenizer.json": tokens})
    store.gather(weights, b"half")
    (tmp_path / "assets" / f".{weights.sha256}.k3v9").write_bytes(b"x" * 7)  # by a process that was killed
    (tmp_path / "assets" / "notes").write_bytes(b"somebody else's")
    sizes = {stored.name: stored.n_bytes for stored in stored_assets(tmp_path / "assets")}
    assert sizes == {weights.sha256[:12]: 111, tokens.sha256[:12]: 100, alone.sha256[:12]: 100}
    assert all(stored.remove() for stored in stored_assets(tmp_path / "assets") if stored.name != tokens.sha256[:12])
    assert not folder.exists()
    left = sorted(path.name for path in (tmp_path / "assets").iterdir() if path.suffix not in {".lock", ".used"})
    assert left == sorted([tokens.sha256, "folders", "notes"])
    store.add(data("w"))
    assert (store.folder_of({"model.safetensors": weights}) / "model.safetensors").read_bytes() == data("w")


def test_a_run_without_assets_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("KILOHIVE_CACHE", str(cache))
    with assets_in_use([]):
        assert not cache.exists()
    with assets_in_use([asset_of(b"x")]):
        assert cache.exists()


def test_the_store_has_a_bound_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path))
    assert asset_store()._max_bytes == 50_000_000_000
    monkeypatch.setenv("KILOHIVE_ASSETS_MAX_SIZE", "1KB")
    add(asset_store(), "a", 100)
    asset_store().add(b"b" * 950)
    assert kept(tmp_path, "a") == ""
    monkeypatch.setenv("KILOHIVE_ASSETS_MAX_SIZE", "much")
    with pytest.raises(ConfigError, match="KILOHIVE_ASSETS_MAX_SIZE: is 'much', must be such as 600MB or 2GB"):
        asset_store()

"""A cache is kept below its bound as far as that can be done; what cannot be deleted is told and stops nobody."""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING

import pytest

from common.eviction import CacheEntry, keep_below

if TYPE_CHECKING:
    from pathlib import Path


def stored_in(folder: Path) -> list[CacheEntry]:
    """Files of 100 bytes and a folder with one, by name from what was used longest ago on."""
    return [
        CacheEntry(
            name=path.name, paths=(path,), n_bytes=100, used_s=0.0, locks=(folder.with_name(f"{path.name}.lock"),)
        )
        for path in sorted(folder.iterdir())
    ]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    (folder / "b").mkdir(parents=True)
    for path in (folder / "a", folder / "b" / "inside", folder / "c"):
        path.write_bytes(b"x" * 100)
    return folder


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize(
    ("max_bytes", "names"), [(0, ["a", "b", "c"]), (300, ["a", "b", "c"]), (299, ["b", "c"]), (100, ["c"]), (1, [])]
)
def test_what_was_used_longest_ago_goes_until_the_rest_fits(cache: Path, max_bytes: int, names: list[str]) -> None:
    keep_below(max_bytes, cache, stored_in)
    assert left(cache) == names


def test_what_is_in_use_stays_and_what_was_used_later_goes_for_it(cache: Path) -> None:
    with cache.with_name("a.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert [one.in_use() for one in stored_in(cache)] == [True, False, False]
        keep_below(200, cache, stored_in)
        assert left(cache) == ["a", "c"]
    keep_below(1, cache, stored_in)
    assert left(cache) == []


def test_what_another_process_deletes_meanwhile_is_gone(cache: Path) -> None:
    stored = stored_in(cache)
    (cache / "a").unlink()
    assert [one.remove() for one in stored] == [True, True, True]
    assert left(cache) == []


def test_what_cannot_be_deleted_is_told(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    def forbidden(folder: Path) -> list[CacheEntry]:
        raise PermissionError(13, "Permission denied", str(folder))

    keep_below(100, cache, forbidden)
    assert caplog.messages == [f"{cache} cannot be kept below its bound: Permission denied"]
    assert left(cache) == ["a", "b", "c"]

"""Who may call a server: on this machine anybody, from elsewhere whoever has its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError
from common.web.access import LOCAL_NAMES, callers_key, names_answered_to

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_on_this_machine_no_key_is_needed_and_only_its_own_names_are_answered_to(host: str) -> None:
    assert not callers_key(None, host, "see it")
    assert names_answered_to(host, "") == {*LOCAL_NAMES, host}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "2001:db8::1"])  # noqa: S104
def test_elsewhere_a_key_file_is_needed(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--listen {host}: whoever reaches it could see it; add --key-file FILE"):
        callers_key(None, host, "see it")
    key = callers_key(tmp_path / "key", host, "see it")
    assert key == (tmp_path / "key").read_text().strip()
    assert names_answered_to(host, key) == frozenset()

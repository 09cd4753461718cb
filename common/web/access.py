"""Who may call a server: anybody on this machine, or from elsewhere whoever has the key in its file."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Final

from common.errors import ConfigError
from common.web.key_file import read_key

if TYPE_CHECKING:
    from pathlib import Path

LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def callers_key(key_file: Path | None, host: str, danger: str) -> str:
    """What callers must have; nothing where they can only be on this machine and no key file is named.

    `host`: the IP address that is listened on. `danger`: what whoever reaches it could do without a key.

    Raises:
        ConfigError: others could call without a key, or the file holds none.
    """
    if key_file is not None:
        return read_key(key_file)
    if not ipaddress.ip_address(host).is_loopback:
        raise ConfigError(
            f"--listen {host}: whoever reaches it could {danger}; add --key-file FILE, which is made if it is not "
            "there, or listen on 127.0.0.1"
        )
    return ""


def names_answered_to(host: str, key: str) -> frozenset[str]:
    """The names that a request may be for: without a key those of this machine alone, with one any, which is empty."""
    return frozenset() if key else LOCAL_NAMES | {host}

"""Which way a node's tunnels went: what nobody needs to know but tests."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

from dht.relay.tunnel import _Tunnel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dht.streams import Stream


@contextmanager
def watched_tunnels() -> Iterator[dict[str, bool]]:
    """Of each peer, whether the last connection to it went without a relay, while this is open."""
    direct: dict[str, bool] = {}
    look = _Tunnel._directly

    async def noted(tunnel: _Tunnel) -> Stream | None:
        found = await look(tunnel)
        direct[tunnel._peer_id] = found is not None
        return found

    with patch.object(_Tunnel, "_directly", noted):
        yield direct

"""Version and end of the records that a node signs about itself. Imports no hivemind, so that a lighthouse can."""

from __future__ import annotations

from protocol.records import MAX_ANNOUNCE_TTL_S

PERIOD_S = 4.0
TTL_S = 20.0
"""Four announcements in a row may be lost before others forget this node."""

WITHDRAW_TIMEOUT_S = 1.0
WITHDRAWN = b""
_SOONER_S = 1e-3


class RecordVersions:
    """Both must grow: peers keep the record that expires last, readers the one with the highest version."""

    def __init__(self, ttl_s: float = TTL_S) -> None:
        self._ttl_s = ttl_s
        self.version = 0
        self.expiration_s = 0.0

    def advance(self, now_s: float) -> None:
        """Advance to the version and the expiration of records that are signed at `now_s`."""
        self.version = max(self.version + 1, int(now_s * 1000))
        self.expiration_s = min(max(now_s + self._ttl_s, self.expiration_s + _SOONER_S), now_s + MAX_ANNOUNCE_TTL_S)

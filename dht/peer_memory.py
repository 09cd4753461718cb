"""Peers of a run that a node knew last time, in a file of its folder: its initial peers may be gone or moved."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from common.atomic_file import write_atomically
from common.errors import ConfigError
from protocol.swarm_file import checked_peers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)

PEERS_FILE = "peers.json"
MAX_PEERS = 16
MAX_FILE_BYTES = 65_536


class PeerMemory:
    """One node's file, of one run; without a path it remembers nothing."""

    def __init__(self, path: Path | None, run_id: str) -> None:
        self._path, self._run_id = path, run_id
        self._saved: tuple[str, ...] = ()

    def load(self) -> tuple[str, ...]:
        """Multiaddresses of peers; none if the file is missing, damaged or another run's."""
        if self._path is None:
            return ()
        try:
            with self._path.open("rb") as file:
                told = json.loads(file.read(MAX_FILE_BYTES))
            if told["run_id"] == self._run_id:
                return checked_peers(told["peers"])[:MAX_PEERS]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            logger.warning("%s: cannot be read (%s), so only the initial peers are asked", self._path, error)
        return ()

    def save(self, peers: Iterable[str]) -> None:
        """Write these if they are new; never none, since those of last time may be back. A full disk does no harm."""
        found = tuple(sorted(peers)[:MAX_PEERS])
        if self._path is None or not found or found == self._saved:
            return
        try:
            write_atomically(self._path, json.dumps({"run_id": self._run_id, "peers": found}).encode(), mode=0o600)
        except OSError as error:
            logger.debug("%s: cannot be written: %s", self._path, error)
            return
        self._saved = found

"""What a person can set of the exports that a coordinator makes of its run, and which runs have none. Light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.errors import ConfigError
from common.settings import FileOnly, shown_name
from protocol.exportable import check_exportable

if TYPE_CHECKING:
    from protocol.manifest import Manifest

SNAPSHOT_MINIMUMS: Final = {"snapshot_every_s": 0, "keep_snapshots": 1}
"""These minimums are for `check_minimums`."""


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """How often a run is exported, where to, and how many exports are kept."""

    snapshot_every_s: float = 0.0
    """Export the model this often, in seconds; 0 never."""
    keep_snapshots: FileOnly[int] = 3
    """Keep this many exports; the oldest goes once a newer one is whole."""
    snapshots: FileOnly[str] = ""
    """Keep the exports in this folder; otherwise in snapshots, below --out."""


@dataclass(frozen=True, kw_only=True)
class LocalSnapshotConfig(SnapshotConfig):
    """What a local swarm passes on to its coordinator of SnapshotConfig."""

    snapshot_every_s: FileOnly[float] = 0.0
    """Export the model this often, in seconds; 0 never."""


def check_snapshots(config: SnapshotConfig, manifest: Manifest) -> None:
    """Raise ConfigError if `config` asks for exports of a run that cannot be exported."""
    if not config.snapshot_every_s:
        return
    try:
        check_exportable(manifest)
    except ConfigError as error:
        raise ConfigError(f"{shown_name(type(config), 'snapshot_every_s')}: {error}") from None

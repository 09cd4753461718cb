"""What one node knows of a run at one moment: immutable, with pure functions on it. Made by `directory.py`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from common.text import moment_text
from protocol.endpoints import Address

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from protocol.announcements import PauseCause, Reachability, ReplicaState, Role
    from protocol.manifest import BlockId
    from protocol.reports import TrainerReport


CAUSE_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "owner": "by its owner",
        "condition": "by its owner's conditions",
        "device": "as its device fails",
        "sleep": "after a sleep",
    }
)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One peer's copy of a block, as the peer last announced it; `version` counts its optimizer steps.

    `divergence`: relative L2 distance to the partner of its last exchange, before it.
    """

    block: BlockId
    peer_id: str
    endpoint: str
    version: int
    queue_tokens: int
    tokens_per_s: float
    tokens_total: int
    n_experts: int
    expiration_s: float
    state: ReplicaState = "serving"
    divergence: float = 0.0

    @property
    def address(self) -> Address:
        """Whom to call for it, and where."""
        return Address(self.peer_id, self.endpoint)


@dataclass(frozen=True, kw_only=True)
class PeerInfo:
    """One peer of the run, as it last announced itself.

    `own_tokens`: what this trainer itself has trained on, of the run's `run_tokens` as it knows them. `staleness`: mean
    optimizer steps between forward and backward at this host, lately. `exchanged_bytes`: averaging and downloads.
    `relay`: its multiaddress, if it carries calls for others. `paused`: it does not work now, and takes no blocks.
    `evaluators` count only as the word of the run's owner: see `evaluators_named`. The two times of a pause are in
    seconds since 1970, 0 where it does not say.
    """

    peer_id: str
    role: Role
    endpoint: str
    software: str
    started_s: float
    n_blocks: int
    tokens_per_s: float
    run_tokens: int
    queue_tokens: int
    expiration_s: float
    own_tokens: int = 0
    staleness: float = 0.0
    exchanged_bytes: int = 0
    reachability: Reachability = "unknown"
    relay: str = ""
    paused: bool = False
    evaluators: tuple[str, ...] = ()
    pause_cause: PauseCause = "none"
    paused_since_s: float = 0.0
    paused_until_s: float = 0.0

    @property
    def pause_text(self) -> str:
        """Why it is paused, since when and until when, as far as it says."""
        return pause_text(self.pause_cause, self.paused_since_s, self.paused_until_s)


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What one trainer measured lately, as it last announced it."""

    peer_id: str
    said: TrainerReport
    expiration_s: float


@dataclass(frozen=True, kw_only=True)
class PeerLoad:
    """How many replicas a peer has, and its load, of which each of its records tells the whole."""

    n_blocks: int
    queue_tokens: int
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class DirectoryView:
    """Replicas and peers that were live at `taken_s`. Every block of experts of the run is a key of `replicas`.

    `replicas` can be called; `others` are those of the same blocks that are still downloaded, or only stored; `trunk`
    are the trainers' copies of the trunk, in any state. `reports` are only there where the directory looks for them.
    """

    taken_s: float = 0.0
    replicas: Mapping[BlockId, tuple[Replica, ...]] = field(default_factory=lambda: MappingProxyType({}))
    others: tuple[Replica, ...] = ()
    trunk: tuple[Replica, ...] = ()
    peers: tuple[PeerInfo, ...] = ()
    reports: tuple[Reported, ...] = ()

    def lost_blocks(self) -> tuple[BlockId, ...]:
        """Blocks without any replica."""
        return tuple(block for block, replicas in self.replicas.items() if not replicas)

    def load_by_peer(self) -> dict[str, PeerLoad]:
        """Load of each peer that hosts something."""
        hosted: defaultdict[str, list[Replica]] = defaultdict(list)
        for replicas in self.replicas.values():
            for replica in replicas:
                hosted[replica.peer_id].append(replica)
        return {
            peer_id: PeerLoad(
                n_blocks=len(replicas),
                queue_tokens=max(replica.queue_tokens for replica in replicas),
                tokens_per_s=max(replica.tokens_per_s for replica in replicas),
            )
            for peer_id, replicas in hosted.items()
        }

    def at(self, now_s: float) -> DirectoryView:
        """Return the view without what has expired by `now_s`."""
        return DirectoryView(
            taken_s=now_s,
            replicas=MappingProxyType({block: _alive(replicas, now_s) for block, replicas in self.replicas.items()}),
            others=_alive(self.others, now_s),
            trunk=_alive(self.trunk, now_s),
            peers=tuple(peer for peer in self.peers if peer.expiration_s > now_s),
            reports=tuple(report for report in self.reports if report.expiration_s > now_s),
        )

    def without(self, peer_ids: frozenset[str]) -> DirectoryView:
        """Return the view without these peers' replicas; the peers themselves stay listed."""
        if not peer_ids:
            return self
        return replace(
            self,
            replicas=MappingProxyType({block: _but(replicas, peer_ids) for block, replicas in self.replicas.items()}),
            others=_but(self.others, peer_ids),
            trunk=_but(self.trunk, peer_ids),
        )


def _alive(replicas: tuple[Replica, ...], now_s: float) -> tuple[Replica, ...]:
    return tuple(replica for replica in replicas if replica.expiration_s > now_s)


def _but(replicas: tuple[Replica, ...], peer_ids: frozenset[str]) -> tuple[Replica, ...]:
    return tuple(replica for replica in replicas if replica.peer_id not in peer_ids)


def evaluators_named(peers: Iterable[PeerInfo], owner: str) -> tuple[str, ...]:
    """Trainers whose verdicts on offered experts the run's owner wants acted on; none while the owner is not there."""
    return next((peer.evaluators for peer in peers if peer.peer_id == owner), ())


def pause_text(cause: str, since_s: float, until_s: float) -> str:
    """A pause in words; the times are in seconds since 1970, 0 where they are not told."""
    since = f"since {moment_text(since_s)}" if since_s else ""
    until = f"until {moment_text(until_s)}" if until_s else ""
    return " ".join(words for words in (CAUSE_WORDS.get(cause), since, until) if words)

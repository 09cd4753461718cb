"""What a trainer tells in its event log, which its display and its report read. Its `start` is in `protocol/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.events import Event


@dataclass(frozen=True, kw_only=True)
class LeftOutEvent(Event):
    """Some files and rows of the corpus are not read; `names` are the first files, with what they are."""

    event: ClassVar[str] = "left_out"

    files: int
    names: tuple[str, ...]
    rows: int
    first_row: str


@dataclass(frozen=True, kw_only=True)
class TrunkJoinedEvent(Event):
    """The trunk of a run that trains already was taken over, from one of so many trainers."""

    event: ClassVar[str] = "trunk_joined"

    version: int
    trainers: int


@dataclass(frozen=True, kw_only=True)
class WaitingEvent(Event):
    """The trainer waits for what `for_` says."""

    event: ClassVar[str] = "waiting"

    for_: str


@dataclass(frozen=True, kw_only=True)
class PausedHost:
    """A host that does not work now: whose doing that is, since when and until when, as far as it says, else 0."""

    peer_id: str
    cause: str
    since_s: float
    until_s: float


@dataclass(frozen=True, kw_only=True)
class PausedHostsEvent(Event):
    """So many hosts are paused now, the first of them by name; there is another event when that changes."""

    event: ClassVar[str] = "paused_hosts"

    hosts: tuple[PausedHost, ...]
    total: int


@dataclass(frozen=True, kw_only=True)
class GateLoad:
    """How evenly the gates spread the tokens; `overflow` counts pairs that capacity dropped in this step.

    `effective_k` and `kept_fraction` are those of `GateStats`, mean of the layers; null until there are any. Of each
    layer are the entropy of its load in bits, the spread of its load, and how many of its live experts are dead.
    """

    dead_fraction: float
    load_cv: float
    entropy_bits: float
    overflow: int
    effective_k: float = 0.0
    kept_fraction: float | None = None
    entropy_bits_by_layer: tuple[float, ...] = ()
    load_cv_by_layer: tuple[float, ...] = ()
    dead_by_layer: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReplicaCounts:
    """Live replicas of a block: fewest and mean."""

    min: int
    mean: float


@dataclass(frozen=True, kw_only=True)
class VersionRange:
    """Oldest and newest version of all live replicas."""

    min: int
    max: int


@dataclass(frozen=True, kw_only=True)
class GradientStaleness:
    """The staleness of this step's gradients, in optimizer steps of the experts."""

    mean: float
    max: int


@dataclass(frozen=True, kw_only=True)
class Divergences:
    """The trunk's divergence at its last exchange, and the largest that is announced of the blocks."""

    trunk: float
    blocks: float


@dataclass(frozen=True, kw_only=True)
class HostLoad:
    """A live host as the trainer sees it; `share` is of this step's pairs."""

    peer_id: str
    endpoint: str
    n_blocks: int
    queue_tokens: int
    tokens_per_s: float
    avoided: bool
    share: float


@dataclass(frozen=True, kw_only=True)
class StepEvent(Event):
    """A step was trained; `loss` in nats per token.

    `own_tokens` are this trainer's, `run_tokens` those of all `trainers` that are live.
    """

    event: ClassVar[str] = "step"

    step: int
    steps: int
    loss: float
    bits_per_byte: float
    run_tokens: int
    own_tokens: int
    trainers: int
    tokens_per_s: float
    in_flight: int
    experts_alive: int
    experts_total: int
    calls_ok: int
    calls_failed: int
    wire_bytes: int
    wire_bytes_per_token: float
    time_left_s: float
    grad_norm: float
    lr: float
    gate: GateLoad
    replicas: ReplicaCounts
    versions: VersionRange
    staleness: GradientStaleness
    divergence: Divergences
    exchanged_bytes: int
    hosts: tuple[HostLoad, ...]


@dataclass(frozen=True, kw_only=True)
class EvalEvent(Event):
    """Held-out text was measured; `loss` in nats per token."""

    event: ClassVar[str] = "eval"

    step: int
    bits_per_byte: float
    run_tokens: int
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class OfferEvent(Event):
    """An offered expert was tried; it gains `low` to `high` nats per token, None where there is no bound."""

    event: ClassVar[str] = "offer"

    layer: int
    expert: int
    peer: str
    state: str
    why: str
    windows: int
    low: float | None
    high: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RetryEvent(Event):
    """A micro-batch starts again without the peers that failed."""

    event: ClassVar[str] = "retry"

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrunkCheckpointFailedEvent(Event):
    """The trunk could not be written; training goes on, and the old checkpoint stays."""

    event: ClassVar[str] = "checkpoint_failed"

    reason: str


@dataclass(frozen=True, kw_only=True)
class SampleEvent(Event):
    """The model wrote a text at the end of its training."""

    event: ClassVar[str] = "sample"

    text: str


@dataclass(frozen=True, kw_only=True)
class StoppedEvent(Event):
    """The training was interrupted, and the trunk saved."""

    event: ClassVar[str] = "stopped"

    step: int


@dataclass(frozen=True, kw_only=True)
class DoneEvent(Event):
    """One training run in numbers; its fields are also those of `summary.json`.

    `tokens` are the whole run's, of all `trainers` that took part; `steps` and `tokens_per_s` are this trainer's. A
    token of held-out text stands for `bytes_per_token` on average.
    """

    event: ClassVar[str] = "done"

    run_id: str
    experts: int
    hosts: int
    trainers: int
    steps: int
    tokens: int
    bits_per_byte_start: float
    bits_per_byte_end: float
    tokens_per_s: float
    calls_failed: int
    wall_s: float
    own_tokens: int
    calls_ok: int
    wire_bytes: int
    exchanged_bytes: int
    train_s: float
    sample: str
    attribution: str
    files: tuple[str, ...]
    bytes_per_token: float = 1.0

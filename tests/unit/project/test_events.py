"""What programs read in event logs stays what it is: names of events, names of fields and their order."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, get_args, get_type_hints

import pytest

from coordinator import events as coordinator_events
from node.averaging import events as averaging_events
from node.host import events as host_events
from node.limits import events as limits_events
from node.membership import events as membership_events
from node.trainer import events as trainer_events
from protocol import node_events
from tests.support.events import classes_in, key

if TYPE_CHECKING:
    from common.events import Event

MODULES = (
    averaging_events,
    membership_events,
    node_events,
    trainer_events,
    host_events,
    limits_events,
    coordinator_events,
)
EVENTS = {kind.__name__: kind for module in MODULES for kind in classes_in(module)}

PINNED = """
ExchangeEvent: exchange partner dialled blocks divergence_max divergence_mean clipped refused bytes seconds problem
DownloadEvent: download block bytes of_bytes bytes_per_s seconds_left
ReachabilityEvent: reachability state endpoint observed asked problem
RelaysEvent: relays relays
TrainingStartEvent: start run_id experts hosts step steps tokens_total parameters_trunk parameters_experts documents \
    bytes_train
LeftOutEvent: left_out files names rows first_row
TrunkJoinedEvent: trunk_joined version trainers
WaitingEvent: waiting for
PausedHostsEvent: paused_hosts hosts(peer_id cause since_s until_s) total
StepEvent: step step steps loss bits_per_byte run_tokens own_tokens trainers tokens_per_s in_flight experts_alive \
    experts_total calls_ok calls_failed wire_bytes wire_bytes_per_token time_left_s grad_norm lr gate(dead_fraction \
    load_cv entropy_bits overflow effective_k kept_fraction entropy_bits_by_layer load_cv_by_layer dead_by_layer) \
    replicas(min mean) versions(min max) staleness(mean max) divergence(trunk blocks) exchanged_bytes \
    hosts(peer_id endpoint n_blocks queue_tokens tokens_per_s avoided share)
EvalEvent: eval step bits_per_byte run_tokens loss
OfferEvent: offer layer expert peer state why windows low high seconds
RetryEvent: retry step reason
TrunkCheckpointFailedEvent: checkpoint_failed reason
SampleEvent: sample text
StoppedEvent: stopped step
DoneEvent: done run_id experts hosts trainers steps tokens bits_per_byte_start bits_per_byte_end tokens_per_s \
    calls_failed wall_s own_tokens calls_ok wire_bytes exchanged_bytes train_s sample attribution files bytes_per_token
LimitsEvent: limits limits room(max_blocks keep_inputs_bytes max_batch_tokens max_queue_tokens max_calls) \
    memory_bytes
FewerBlocksEvent: fewer_blocks max_blocks reason
AskedEvent: asked word paused reasons until_s
PausedEvent: paused reasons stored
ResumedEvent: resumed blocks
LeavingEvent: leaving blocks
HandedOverEvent: handed_over blocks left
JoinedEvent: joined block version source seconds
JoinFailedEvent: join_failed block reason
PlacementEvent: placement take drop
AnnouncedEvent: announced run_id peer_id endpoint addresses versions device seconds_since_start
LoadEvent: load tokens_per_s tokens_total queue_tokens kept_inputs_bytes refused staleness steps_refused \
    exchanged_bytes sent_bytes received_bytes cpu_s memory_bytes
TakenInEvent: taken_in layer expert version tested
CheckpointEvent: checkpoint blocks seconds
BlockCheckpointFailedEvent: checkpoint_failed reason
HostLeaveEvent: leave
AvailabilityEvent: availability reasons(name why since_s until_s) unknown
PeerStartEvent: start run_id peer_id addresses
PeerLeaveEvent: leave
SnapshotEvent: snapshot folder bytes seconds deleted
SnapshotFailedEvent: snapshot_failed reason
CreditEvent: credit asked answered new refused
LocalStartEvent: start run_id hosts
ChildEndedEvent: ended name exit_code
LocalEndEvent: end dead killed
"""


def written(kind: type[Event]) -> str:
    """Its name and those of its fields; in brackets those of the dataclass that a field holds."""
    hints = get_type_hints(kind)
    return " ".join([kind.event, *(key(field.name) + parts(hints[field.name]) for field in fields(kind))])


def parts(hint: object) -> str:
    kind = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
    return f"({' '.join(field.name for field in fields(kind))})" if kind is not None else ""


@pytest.mark.parametrize("line", PINNED.strip().splitlines())
def test_an_event_is_written_as_it_always_was(line: str) -> None:
    name, _, wanted = line.partition(": ")
    assert written(EVENTS[name]).split() == wanted.split()


def test_every_event_is_pinned() -> None:
    assert [line.partition(":")[0] for line in PINNED.strip().splitlines()] == list(EVENTS)

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVING: _ClassVar[ReplicaState]
    JOINING: _ClassVar[ReplicaState]
    STORED: _ClassVar[ReplicaState]

class PauseCause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOT_PAUSED: _ClassVar[PauseCause]
    BY_OWNER: _ClassVar[PauseCause]
    BY_CONDITION: _ClassVar[PauseCause]
    BY_DEVICE: _ClassVar[PauseCause]
    BY_SLEEP: _ClassVar[PauseCause]

class Reachability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNKNOWN: _ClassVar[Reachability]
    REACHED: _ClassVar[Reachability]
    NOT_REACHED: _ClassVar[Reachability]
    RELAYED: _ClassVar[Reachability]
SERVING: ReplicaState
JOINING: ReplicaState
STORED: ReplicaState
NOT_PAUSED: PauseCause
BY_OWNER: PauseCause
BY_CONDITION: PauseCause
BY_DEVICE: PauseCause
BY_SLEEP: PauseCause
UNKNOWN: Reachability
REACHED: Reachability
NOT_REACHED: Reachability
RELAYED: Reachability

class SignedRecord(_message.Message):
    __slots__ = ("key", "subkey", "version", "expiration_s", "payload", "public_key", "signature", "protocol_version", "ticket")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SUBKEY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPIRATION_S_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    key: str
    subkey: str
    version: int
    expiration_s: float
    payload: bytes
    public_key: bytes
    signature: bytes
    protocol_version: int
    ticket: bytes
    def __init__(self, key: _Optional[str] = ..., subkey: _Optional[str] = ..., version: _Optional[int] = ..., expiration_s: _Optional[float] = ..., payload: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., protocol_version: _Optional[int] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class BlockRecord(_message.Message):
    __slots__ = ("layer", "block", "version", "endpoint", "queue_tokens", "tokens_per_s", "tokens_total", "n_experts", "trunk", "state", "divergence")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    N_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TRUNK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    block: int
    version: int
    endpoint: str
    queue_tokens: int
    tokens_per_s: float
    tokens_total: int
    n_experts: int
    trunk: bool
    state: ReplicaState
    divergence: float
    def __init__(self, layer: _Optional[int] = ..., block: _Optional[int] = ..., version: _Optional[int] = ..., endpoint: _Optional[str] = ..., queue_tokens: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., tokens_total: _Optional[int] = ..., n_experts: _Optional[int] = ..., trunk: _Optional[bool] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., divergence: _Optional[float] = ...) -> None: ...

class PeerRecord(_message.Message):
    __slots__ = ("role", "endpoint", "software", "started_s", "n_blocks", "tokens_per_s", "run_tokens", "queue_tokens", "own_tokens", "staleness", "exchanged_bytes", "reachability", "relay", "paused", "evaluators", "pause_cause", "paused_since_s", "paused_until_s")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    N_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OWN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    EXCHANGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REACHABILITY_FIELD_NUMBER: _ClassVar[int]
    RELAY_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    EVALUATORS_FIELD_NUMBER: _ClassVar[int]
    PAUSE_CAUSE_FIELD_NUMBER: _ClassVar[int]
    PAUSED_SINCE_S_FIELD_NUMBER: _ClassVar[int]
    PAUSED_UNTIL_S_FIELD_NUMBER: _ClassVar[int]
    role: str
    endpoint: str
    software: str
    started_s: float
    n_blocks: int
    tokens_per_s: float
    run_tokens: int
    queue_tokens: int
    own_tokens: int
    staleness: float
    exchanged_bytes: int
    reachability: Reachability
    relay: str
    paused: bool
    evaluators: _containers.RepeatedScalarFieldContainer[str]
    pause_cause: PauseCause
    paused_since_s: float
    paused_until_s: float
    def __init__(self, role: _Optional[str] = ..., endpoint: _Optional[str] = ..., software: _Optional[str] = ..., started_s: _Optional[float] = ..., n_blocks: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., run_tokens: _Optional[int] = ..., queue_tokens: _Optional[int] = ..., own_tokens: _Optional[int] = ..., staleness: _Optional[float] = ..., exchanged_bytes: _Optional[int] = ..., reachability: _Optional[_Union[Reachability, str]] = ..., relay: _Optional[str] = ..., paused: _Optional[bool] = ..., evaluators: _Optional[_Iterable[str]] = ..., pause_cause: _Optional[_Union[PauseCause, str]] = ..., paused_since_s: _Optional[float] = ..., paused_until_s: _Optional[float] = ...) -> None: ...

class TrainerReport(_message.Message):
    __slots__ = ("format", "step", "run_tokens", "train_bits_per_byte", "tokens_per_s", "staleness", "calls_ok", "calls_failed", "wire_bytes", "load_entropy_bits", "load_cv", "dead_experts", "evaluated_tokens", "held_out_bits_per_byte")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_BITS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    CALLS_OK_FIELD_NUMBER: _ClassVar[int]
    CALLS_FAILED_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_ENTROPY_BITS_FIELD_NUMBER: _ClassVar[int]
    LOAD_CV_FIELD_NUMBER: _ClassVar[int]
    DEAD_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_BITS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    format: int
    step: int
    run_tokens: int
    train_bits_per_byte: float
    tokens_per_s: float
    staleness: float
    calls_ok: int
    calls_failed: int
    wire_bytes: int
    load_entropy_bits: _containers.RepeatedScalarFieldContainer[float]
    load_cv: _containers.RepeatedScalarFieldContainer[float]
    dead_experts: _containers.RepeatedScalarFieldContainer[int]
    evaluated_tokens: _containers.RepeatedScalarFieldContainer[int]
    held_out_bits_per_byte: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, format: _Optional[int] = ..., step: _Optional[int] = ..., run_tokens: _Optional[int] = ..., train_bits_per_byte: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., staleness: _Optional[float] = ..., calls_ok: _Optional[int] = ..., calls_failed: _Optional[int] = ..., wire_bytes: _Optional[int] = ..., load_entropy_bits: _Optional[_Iterable[float]] = ..., load_cv: _Optional[_Iterable[float]] = ..., dead_experts: _Optional[_Iterable[int]] = ..., evaluated_tokens: _Optional[_Iterable[int]] = ..., held_out_bits_per_byte: _Optional[_Iterable[float]] = ...) -> None: ...

class ManifestRecord(_message.Message):
    __slots__ = ("toml",)
    TOML_FIELD_NUMBER: _ClassVar[int]
    toml: str
    def __init__(self, toml: _Optional[str] = ...) -> None: ...

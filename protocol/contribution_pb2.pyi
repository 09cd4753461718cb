from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OfferState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAITING: _ClassVar[OfferState]
    EVALUATING: _ClassVar[OfferState]
    GAINED: _ClassVar[OfferState]
    REFUSED: _ClassVar[OfferState]
    NOT_TESTED: _ClassVar[OfferState]
WAITING: OfferState
EVALUATING: OfferState
GAINED: OfferState
REFUSED: OfferState
NOT_TESTED: OfferState

class OfferBegin(_message.Message):
    __slots__ = ("run_id", "layer", "expert", "n_bytes", "sha256", "verdicts")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    N_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    layer: int
    expert: int
    n_bytes: int
    sha256: bytes
    verdicts: _containers.RepeatedCompositeFieldContainer[SignedVerdict]
    def __init__(self, run_id: _Optional[str] = ..., layer: _Optional[int] = ..., expert: _Optional[int] = ..., n_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., verdicts: _Optional[_Iterable[_Union[SignedVerdict, _Mapping]]] = ...) -> None: ...

class OfferMessage(_message.Message):
    __slots__ = ("begin", "piece")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    begin: OfferBegin
    piece: bytes
    def __init__(self, begin: _Optional[_Union[OfferBegin, _Mapping]] = ..., piece: _Optional[bytes] = ...) -> None: ...

class AskRequest(_message.Message):
    __slots__ = ("run_id", "layer", "expert", "sha256")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    layer: int
    expert: int
    sha256: bytes
    def __init__(self, run_id: _Optional[str] = ..., layer: _Optional[int] = ..., expert: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class OfferStatus(_message.Message):
    __slots__ = ("state", "ahead", "n_windows", "of_windows", "low", "high", "why", "verdict")
    STATE_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    N_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    OF_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    state: OfferState
    ahead: int
    n_windows: int
    of_windows: int
    low: float
    high: float
    why: str
    verdict: SignedVerdict
    def __init__(self, state: _Optional[_Union[OfferState, str]] = ..., ahead: _Optional[int] = ..., n_windows: _Optional[int] = ..., of_windows: _Optional[int] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., why: _Optional[str] = ..., verdict: _Optional[_Union[SignedVerdict, _Mapping]] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("protocol_version", "run_id", "layer", "expert", "sha256", "version", "n_windows", "low", "high", "issued_s")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    N_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    ISSUED_S_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_id: str
    layer: int
    expert: int
    sha256: bytes
    version: int
    n_windows: int
    low: float
    high: float
    issued_s: float
    def __init__(self, protocol_version: _Optional[int] = ..., run_id: _Optional[str] = ..., layer: _Optional[int] = ..., expert: _Optional[int] = ..., sha256: _Optional[bytes] = ..., version: _Optional[int] = ..., n_windows: _Optional[int] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., issued_s: _Optional[float] = ...) -> None: ...

class SignedVerdict(_message.Message):
    __slots__ = ("verdict", "public_key", "signature")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    verdict: bytes
    public_key: bytes
    signature: bytes
    def __init__(self, verdict: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class TakeInResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

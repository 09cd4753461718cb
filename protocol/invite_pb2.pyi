from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Invite(_message.Message):
    __slots__ = ("run_id", "initial_peers", "owner", "expires_s", "admission")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INITIAL_PEERS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    initial_peers: _containers.RepeatedScalarFieldContainer[str]
    owner: bytes
    expires_s: int
    admission: bytes
    def __init__(self, run_id: _Optional[str] = ..., initial_peers: _Optional[_Iterable[str]] = ..., owner: _Optional[bytes] = ..., expires_s: _Optional[int] = ..., admission: _Optional[bytes] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Receipt(_message.Message):
    __slots__ = ("run_id", "host", "trainer", "start_s", "end_s", "forward_pairs", "backward_pairs", "nonce", "answers_sha256")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    TRAINER_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_PAIRS_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_PAIRS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_SHA256_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    host: bytes
    trainer: bytes
    start_s: int
    end_s: int
    forward_pairs: int
    backward_pairs: int
    nonce: bytes
    answers_sha256: bytes
    def __init__(self, run_id: _Optional[str] = ..., host: _Optional[bytes] = ..., trainer: _Optional[bytes] = ..., start_s: _Optional[int] = ..., end_s: _Optional[int] = ..., forward_pairs: _Optional[int] = ..., backward_pairs: _Optional[int] = ..., nonce: _Optional[bytes] = ..., answers_sha256: _Optional[bytes] = ...) -> None: ...

class SignedReceipt(_message.Message):
    __slots__ = ("receipt", "trainer_signature", "host_signature")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    TRAINER_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    HOST_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    trainer_signature: bytes
    host_signature: bytes
    def __init__(self, receipt: _Optional[bytes] = ..., trainer_signature: _Optional[bytes] = ..., host_signature: _Optional[bytes] = ...) -> None: ...

class CountersignResponse(_message.Message):
    __slots__ = ("host_signature",)
    HOST_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    host_signature: bytes
    def __init__(self, host_signature: _Optional[bytes] = ...) -> None: ...

class CountedRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class CountedResponse(_message.Message):
    __slots__ = ("forward_pairs", "backward_pairs")
    FORWARD_PAIRS_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_PAIRS_FIELD_NUMBER: _ClassVar[int]
    forward_pairs: int
    backward_pairs: int
    def __init__(self, forward_pairs: _Optional[int] = ..., backward_pairs: _Optional[int] = ...) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("run_id", "store", "after")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    store: bytes
    after: int
    def __init__(self, run_id: _Optional[str] = ..., store: _Optional[bytes] = ..., after: _Optional[int] = ...) -> None: ...

class ReceiptPage(_message.Message):
    __slots__ = ("store", "receipts", "next", "more", "profile")
    STORE_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    store: bytes
    receipts: _containers.RepeatedCompositeFieldContainer[SignedReceipt]
    next: int
    more: bool
    profile: SignedProfile
    def __init__(self, store: _Optional[bytes] = ..., receipts: _Optional[_Iterable[_Union[SignedReceipt, _Mapping]]] = ..., next: _Optional[int] = ..., more: _Optional[bool] = ..., profile: _Optional[_Union[SignedProfile, _Mapping]] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("name", "team", "issued_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    ISSUED_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    team: str
    issued_s: int
    def __init__(self, name: _Optional[str] = ..., team: _Optional[str] = ..., issued_s: _Optional[int] = ...) -> None: ...

class SignedProfile(_message.Message):
    __slots__ = ("profile", "public_key", "signature")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    profile: bytes
    public_key: bytes
    signature: bytes
    def __init__(self, profile: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

from protocol import expert_pb2 as _expert_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACCEPTED: _ClassVar[Reason]
    NOT_HERE: _ClassVar[Reason]
    BUSY: _ClassVar[Reason]
    SCHEMA: _ClassVar[Reason]
    SLOW: _ClassVar[Reason]
ACCEPTED: Reason
NOT_HERE: Reason
BUSY: Reason
SCHEMA: Reason
SLOW: Reason

class BlockOffer(_message.Message):
    __slots__ = ("block", "schema", "version", "reason")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    block: str
    schema: bytes
    version: int
    reason: Reason
    def __init__(self, block: _Optional[str] = ..., schema: _Optional[bytes] = ..., version: _Optional[int] = ..., reason: _Optional[_Union[Reason, str]] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("protocol_version", "run_id", "peer_id", "blocks")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_id: str
    peer_id: str
    blocks: _containers.RepeatedCompositeFieldContainer[BlockOffer]
    def __init__(self, protocol_version: _Optional[int] = ..., run_id: _Optional[str] = ..., peer_id: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[BlockOffer, _Mapping]]] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("block", "version", "work", "steps", "weights_only", "first_piece", "listens")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ONLY_FIELD_NUMBER: _ClassVar[int]
    FIRST_PIECE_FIELD_NUMBER: _ClassVar[int]
    LISTENS_FIELD_NUMBER: _ClassVar[int]
    block: str
    version: int
    work: _containers.RepeatedScalarFieldContainer[float]
    steps: _containers.RepeatedScalarFieldContainer[int]
    weights_only: bool
    first_piece: int
    listens: bool
    def __init__(self, block: _Optional[str] = ..., version: _Optional[int] = ..., work: _Optional[_Iterable[float]] = ..., steps: _Optional[_Iterable[int]] = ..., weights_only: _Optional[bool] = ..., first_piece: _Optional[int] = ..., listens: _Optional[bool] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("tensor", "offset", "values", "hash")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    offset: int
    values: _expert_pb2.Tensor
    hash: bytes
    def __init__(self, tensor: _Optional[str] = ..., offset: _Optional[int] = ..., values: _Optional[_Union[_expert_pb2.Tensor, _Mapping]] = ..., hash: _Optional[bytes] = ...) -> None: ...

class Settle(_message.Message):
    __slots__ = ("block", "exact")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    block: str
    exact: bool
    def __init__(self, block: _Optional[str] = ..., exact: _Optional[bool] = ...) -> None: ...

class ExchangeMessage(_message.Message):
    __slots__ = ("offer", "start", "piece", "settle")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    offer: Offer
    start: Start
    piece: Piece
    settle: Settle
    def __init__(self, offer: _Optional[_Union[Offer, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ..., settle: _Optional[_Union[Settle, _Mapping]] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("run_id", "block", "params_only", "first_piece")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    PARAMS_ONLY_FIELD_NUMBER: _ClassVar[int]
    FIRST_PIECE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    block: str
    params_only: bool
    first_piece: int
    def __init__(self, run_id: _Optional[str] = ..., block: _Optional[str] = ..., params_only: _Optional[bool] = ..., first_piece: _Optional[int] = ...) -> None: ...

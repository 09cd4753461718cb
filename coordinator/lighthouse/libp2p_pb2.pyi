from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNUSED: _ClassVar[Status]
    OK: _ClassVar[Status]
    RESERVATION_REFUSED: _ClassVar[Status]
    RESOURCE_LIMIT_EXCEEDED: _ClassVar[Status]
    PERMISSION_DENIED: _ClassVar[Status]
    CONNECTION_FAILED: _ClassVar[Status]
    NO_RESERVATION: _ClassVar[Status]
    MALFORMED_MESSAGE: _ClassVar[Status]
    UNEXPECTED_MESSAGE: _ClassVar[Status]
UNUSED: Status
OK: Status
RESERVATION_REFUSED: Status
RESOURCE_LIMIT_EXCEEDED: Status
PERMISSION_DENIED: Status
CONNECTION_FAILED: Status
NO_RESERVATION: Status
MALFORMED_MESSAGE: Status
UNEXPECTED_MESSAGE: Status

class CircuitPeer(_message.Message):
    __slots__ = ("id", "addresses")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    addresses: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, id: _Optional[bytes] = ..., addresses: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Reservation(_message.Message):
    __slots__ = ("expire_s", "addresses")
    EXPIRE_S_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    expire_s: int
    addresses: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, expire_s: _Optional[int] = ..., addresses: _Optional[_Iterable[bytes]] = ...) -> None: ...

class CircuitLimit(_message.Message):
    __slots__ = ("duration_s", "data_bytes")
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    DATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    duration_s: int
    data_bytes: int
    def __init__(self, duration_s: _Optional[int] = ..., data_bytes: _Optional[int] = ...) -> None: ...

class HopMessage(_message.Message):
    __slots__ = ("kind", "peer", "reservation", "limit", "status")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RESERVE: _ClassVar[HopMessage.Kind]
        CONNECT: _ClassVar[HopMessage.Kind]
        STATUS: _ClassVar[HopMessage.Kind]
    RESERVE: HopMessage.Kind
    CONNECT: HopMessage.Kind
    STATUS: HopMessage.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    kind: HopMessage.Kind
    peer: CircuitPeer
    reservation: Reservation
    limit: CircuitLimit
    status: Status
    def __init__(self, kind: _Optional[_Union[HopMessage.Kind, str]] = ..., peer: _Optional[_Union[CircuitPeer, _Mapping]] = ..., reservation: _Optional[_Union[Reservation, _Mapping]] = ..., limit: _Optional[_Union[CircuitLimit, _Mapping]] = ..., status: _Optional[_Union[Status, str]] = ...) -> None: ...

class StopMessage(_message.Message):
    __slots__ = ("kind", "peer", "limit", "status")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CONNECT: _ClassVar[StopMessage.Kind]
        STATUS: _ClassVar[StopMessage.Kind]
    CONNECT: StopMessage.Kind
    STATUS: StopMessage.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    kind: StopMessage.Kind
    peer: CircuitPeer
    limit: CircuitLimit
    status: Status
    def __init__(self, kind: _Optional[_Union[StopMessage.Kind, str]] = ..., peer: _Optional[_Union[CircuitPeer, _Mapping]] = ..., limit: _Optional[_Union[CircuitLimit, _Mapping]] = ..., status: _Optional[_Union[Status, str]] = ...) -> None: ...

class KademliaPeer(_message.Message):
    __slots__ = ("id", "addresses", "connection")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CONNECTION_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    addresses: _containers.RepeatedScalarFieldContainer[bytes]
    connection: int
    def __init__(self, id: _Optional[bytes] = ..., addresses: _Optional[_Iterable[bytes]] = ..., connection: _Optional[int] = ...) -> None: ...

class KademliaMessage(_message.Message):
    __slots__ = ("kind", "key", "closer_peers")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PUT_VALUE: _ClassVar[KademliaMessage.Kind]
        GET_VALUE: _ClassVar[KademliaMessage.Kind]
        ADD_PROVIDER: _ClassVar[KademliaMessage.Kind]
        GET_PROVIDERS: _ClassVar[KademliaMessage.Kind]
        FIND_NODE: _ClassVar[KademliaMessage.Kind]
        PING: _ClassVar[KademliaMessage.Kind]
    PUT_VALUE: KademliaMessage.Kind
    GET_VALUE: KademliaMessage.Kind
    ADD_PROVIDER: KademliaMessage.Kind
    GET_PROVIDERS: KademliaMessage.Kind
    FIND_NODE: KademliaMessage.Kind
    PING: KademliaMessage.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CLOSER_PEERS_FIELD_NUMBER: _ClassVar[int]
    kind: KademliaMessage.Kind
    key: bytes
    closer_peers: _containers.RepeatedCompositeFieldContainer[KademliaPeer]
    def __init__(self, kind: _Optional[_Union[KademliaMessage.Kind, str]] = ..., key: _Optional[bytes] = ..., closer_peers: _Optional[_Iterable[_Union[KademliaPeer, _Mapping]]] = ...) -> None: ...

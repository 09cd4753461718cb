from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class DialBackRequest(_message.Message):
    __slots__ = ("port",)
    PORT_FIELD_NUMBER: _ClassVar[int]
    port: int
    def __init__(self, port: _Optional[int] = ...) -> None: ...

class DialBackResponse(_message.Message):
    __slots__ = ("observed", "reached", "problem")
    OBSERVED_FIELD_NUMBER: _ClassVar[int]
    REACHED_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    observed: str
    reached: bool
    problem: str
    def __init__(self, observed: _Optional[str] = ..., reached: _Optional[bool] = ..., problem: _Optional[str] = ...) -> None: ...

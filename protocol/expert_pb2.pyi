from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_FP64: _ClassVar[Codec]
    CODEC_FP32: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_FP16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
    CODEC_INT32: _ClassVar[Codec]
CODEC_UNSPECIFIED: Codec
CODEC_FP64: Codec
CODEC_FP32: Codec
CODEC_BF16: Codec
CODEC_FP16: Codec
CODEC_INT8: Codec
CODEC_INT32: Codec

class Tensor(_message.Message):
    __slots__ = ("codec", "shape", "data", "scales")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    codec: Codec
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    scales: bytes
    def __init__(self, codec: _Optional[_Union[Codec, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...

class Pairs(_message.Message):
    __slots__ = ("token_P", "expert_P", "weight_P")
    TOKEN_P_FIELD_NUMBER: _ClassVar[int]
    EXPERT_P_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_P_FIELD_NUMBER: _ClassVar[int]
    token_P: Tensor
    expert_P: Tensor
    weight_P: Tensor
    def __init__(self, token_P: _Optional[_Union[Tensor, _Mapping]] = ..., expert_P: _Optional[_Union[Tensor, _Mapping]] = ..., weight_P: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Inputs(_message.Message):
    __slots__ = ("tokens_TD", "pairs")
    TOKENS_TD_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    tokens_TD: Tensor
    pairs: Pairs
    def __init__(self, tokens_TD: _Optional[_Union[Tensor, _Mapping]] = ..., pairs: _Optional[_Union[Pairs, _Mapping]] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("run_id", "request_id", "layer", "inputs", "keep_inputs")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_INPUTS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    request_id: bytes
    layer: int
    inputs: Inputs
    keep_inputs: bool
    def __init__(self, run_id: _Optional[str] = ..., request_id: _Optional[bytes] = ..., layer: _Optional[int] = ..., inputs: _Optional[_Union[Inputs, _Mapping]] = ..., keep_inputs: _Optional[bool] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("combined_TD", "queue_tokens", "version")
    COMBINED_TD_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    combined_TD: Tensor
    queue_tokens: int
    version: int
    def __init__(self, combined_TD: _Optional[_Union[Tensor, _Mapping]] = ..., queue_tokens: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class BackwardRequest(_message.Message):
    __slots__ = ("run_id", "request_id", "layer", "grad_combined_TD", "inputs", "run_tokens", "version", "no_step")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    GRAD_COMBINED_TD_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NO_STEP_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    request_id: bytes
    layer: int
    grad_combined_TD: Tensor
    inputs: Inputs
    run_tokens: int
    version: int
    no_step: bool
    def __init__(self, run_id: _Optional[str] = ..., request_id: _Optional[bytes] = ..., layer: _Optional[int] = ..., grad_combined_TD: _Optional[_Union[Tensor, _Mapping]] = ..., inputs: _Optional[_Union[Inputs, _Mapping]] = ..., run_tokens: _Optional[int] = ..., version: _Optional[int] = ..., no_step: _Optional[bool] = ...) -> None: ...

class BackwardResponse(_message.Message):
    __slots__ = ("grad_tokens_TD", "grad_weight_P", "stepped", "staleness")
    GRAD_TOKENS_TD_FIELD_NUMBER: _ClassVar[int]
    GRAD_WEIGHT_P_FIELD_NUMBER: _ClassVar[int]
    STEPPED_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    grad_tokens_TD: Tensor
    grad_weight_P: Tensor
    stepped: bool
    staleness: int
    def __init__(self, grad_tokens_TD: _Optional[_Union[Tensor, _Mapping]] = ..., grad_weight_P: _Optional[_Union[Tensor, _Mapping]] = ..., stepped: _Optional[bool] = ..., staleness: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class BlockDescription(_message.Message):
    __slots__ = ("layer", "block", "version", "n_experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    N_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    block: int
    version: int
    n_experts: int
    def __init__(self, layer: _Optional[int] = ..., block: _Optional[int] = ..., version: _Optional[int] = ..., n_experts: _Optional[int] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("run_id", "peer_id", "software", "blocks", "queue_tokens", "tokens_total")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    peer_id: str
    software: str
    blocks: _containers.RepeatedCompositeFieldContainer[BlockDescription]
    queue_tokens: int
    tokens_total: int
    def __init__(self, run_id: _Optional[str] = ..., peer_id: _Optional[str] = ..., software: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[BlockDescription, _Mapping]]] = ..., queue_tokens: _Optional[int] = ..., tokens_total: _Optional[int] = ...) -> None: ...

"""Bad input to a host over real gRPC: a typed error that names the field, and the host goes on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from common.errors import ConfigError
from node.host.serving.service import SERVICE_NAME
from node.model.pairs import Pairs
from node.rpc.expert_codec import encode_inputs
from node.rpc.handlers import CallCounts, unary
from node.rpc.server import NodeServer
from protocol import expert_pb2 as pb
from protocol.limits import MAX_MESSAGE_BYTES
from protocol.manifest import BlockId, all_blocks
from protocol.tensors import encode
from tests.support.channels import plain_aio_channel, plain_channel
from tests.support.swarm_parts import PLAIN, LoopThread, TestSwarm, running_swarm, small_manifest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

MANIFEST = small_manifest()
ID = b"0123456789abcdef"
TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def swarm() -> Iterator[TestSwarm]:
    with running_swarm(MANIFEST, n_hosts=0) as swarm:
        swarm.add_host("host", [block for block in all_blocks(MANIFEST.model) if block.layer == 0])
        yield swarm


@pytest.fixture
def channel(swarm: TestSwarm) -> Iterator[grpc.Channel]:
    with plain_channel(swarm.hosts[0].server.endpoint) as channel:
        yield channel


def inputs(n_tokens: int = 3, **changes: Any) -> pb.Inputs:
    pairs = Pairs(torch.arange(n_tokens), torch.arange(n_tokens), torch.ones(n_tokens))
    message = encode_inputs(torch.ones(n_tokens, 16), pairs, "fp32")
    for name, value in changes.items():
        target = message if name == "tokens_TD" else message.pairs
        getattr(target, name).CopyFrom(value)
    return message


def forward(**changes: Any) -> pb.ForwardRequest:
    fields = {"run_id": MANIFEST.run_id, "request_id": ID, "layer": 0, "inputs": inputs(), "keep_inputs": True}
    return pb.ForwardRequest(**{**fields, **changes})


def backward(**changes: Any) -> pb.BackwardRequest:
    fields = {
        "run_id": MANIFEST.run_id,
        "request_id": ID,
        "layer": 0,
        "inputs": inputs(),
        "grad_combined_TD": encode(torch.ones(3, 16), "fp32"),
    }
    return pb.BackwardRequest(**{**fields, **changes})


def call(channel: grpc.Channel, method: str, raw: bytes, timeout_s: float = TIMEOUT_S) -> bytes:
    answer: bytes = channel.unary_unary(
        f"/kilohive.v1.Expert/{method}", request_serializer=bytes, response_deserializer=bytes
    )(raw, timeout=timeout_s)
    return answer


def hold(entered: threading.Event, release: threading.Event) -> None:
    entered.set()
    release.wait(TIMEOUT_S)


def indices(*values: int) -> pb.Tensor:
    data = torch.tensor(values, dtype=torch.int32).numpy().tobytes()
    return pb.Tensor(codec=pb.CODEC_INT32, shape=[len(values)], data=data)


NAN = encode(torch.full((3, 16), float("nan")), "fp32")
BAD_FORWARD: dict[str, tuple[Callable[[], pb.ForwardRequest], str, str, str]] = {
    "unknown run": (lambda: forward(run_id="other"), "NOT_FOUND", "run_id", "this host serves"),
    "short request id": (lambda: forward(request_id=b"x"), "INVALID_ARGUMENT", "request_id", "must have 16"),
    "layer not hosted": (lambda: forward(layer=1), "NOT_FOUND", "layer", "no block of layer 1 is hosted here"),
    "layer out of range": (lambda: forward(layer=2**32 - 1), "NOT_FOUND", "layer", "is hosted here"),
    "no inputs": (lambda: forward(inputs=None), "INVALID_ARGUMENT", "inputs.tokens_TD", "is empty"),
    "width": (
        lambda: forward(inputs=inputs(tokens_TD=encode(torch.ones(3, 15), "fp32"))),
        "INVALID_ARGUMENT",
        "inputs.tokens_TD",
        "shape is 3 x 15, must be any x 16",
    ),
    "dtype": (
        lambda: forward(inputs=inputs(tokens_TD=pb.Tensor(codec=77, shape=[3, 16], data=b""))),  # type: ignore[arg-type]
        "INVALID_ARGUMENT",
        "inputs.tokens_TD",
        "codec 77 is not one of",
    ),
    "nan": (lambda: forward(inputs=inputs(tokens_TD=NAN)), "INVALID_ARGUMENT", "inputs.tokens_TD", "holds NaN"),
    "bytes that do not fit the shape": (
        lambda: forward(inputs=inputs(tokens_TD=pb.Tensor(codec=pb.CODEC_FP32, shape=[3, 16], data=b"abc"))),
        "INVALID_ARGUMENT",
        "inputs.tokens_TD",
        "has 3 bytes, its shape needs 192",
    ),
    "a shape that would need terabytes": (
        lambda: forward(inputs=inputs(tokens_TD=pb.Tensor(codec=pb.CODEC_FP32, shape=[2**31, 16]))),
        "INVALID_ARGUMENT",
        "inputs.tokens_TD rows",
        "the limit is 65536",
    ),
    "expert out of range": (
        lambda: forward(inputs=inputs(expert_P=indices(0, 1, 16))),
        "INVALID_ARGUMENT",
        "inputs.pairs.expert_P",
        "index 16 is outside 0 to 15",
    ),
    "token out of range": (
        lambda: forward(inputs=inputs(token_P=indices(0, 1, 3))),
        "INVALID_ARGUMENT",
        "inputs.pairs.token_P",
        "index 3 is outside 0 to 2",
    ),
    "more pairs than tokens allow": (
        lambda: forward(inputs=inputs(token_P=indices(*[0] * 7))),
        "INVALID_ARGUMENT",
        "inputs.pairs",
        "is 7, but the limit is 6",
    ),
    "pairs of unequal length": (
        lambda: forward(inputs=inputs(expert_P=indices(0, 1))),
        "INVALID_ARGUMENT",
        "inputs.pairs.expert_P",
        "shape is 2, must be 3",
    ),
}


@pytest.mark.parametrize("name", list(BAD_FORWARD))
def test_a_bad_forward_is_refused_by_field_and_the_host_goes_on(channel: grpc.Channel, name: str) -> None:
    build, status, field, problem = BAD_FORWARD[name]
    check_refused(channel, "Forward", build().SerializeToString(), (status, field, problem))


BAD_BACKWARD: dict[str, tuple[Callable[[], pb.BackwardRequest], str, str, str]] = {
    "gradient of another height": (
        lambda: backward(grad_combined_TD=encode(torch.ones(4, 16), "fp32")),
        "INVALID_ARGUMENT",
        "grad_combined_TD",
        "shape is 4 x 16, must be 3 x 16",
    ),
    "nan": (lambda: backward(grad_combined_TD=NAN), "INVALID_ARGUMENT", "grad_combined_TD", "holds NaN"),
    "tokens beyond any run": (lambda: backward(run_tokens=2**63), "INVALID_ARGUMENT", "run_tokens", "the limit is"),
    "unknown run": (lambda: backward(run_id=""), "NOT_FOUND", "run_id", "this host serves"),
}


@pytest.mark.parametrize("name", list(BAD_BACKWARD))
def test_a_bad_backward_is_refused_by_field_and_steps_nothing(
    swarm: TestSwarm, channel: grpc.Channel, name: str
) -> None:
    before = {block_id: block.version for block_id, block in swarm.hosts[0].blocks.items()}
    build, status, field, problem = BAD_BACKWARD[name]
    check_refused(channel, "Backward", build().SerializeToString(), (status, field, problem))
    assert {block_id: block.version for block_id, block in swarm.hosts[0].blocks.items()} == before


def test_an_unknown_request_id_asks_for_the_inputs(channel: grpc.Channel) -> None:
    raw = backward(request_id=b"never seen 12345", inputs=None).SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "Backward", raw)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "send them again" in str(caught.value.details())


@pytest.mark.parametrize("method", ["Forward", "Backward", "Describe"])
@pytest.mark.parametrize("raw", [b"\xff\xff\xff\xff", b"\x0a\xff\x01ab"])
def test_truncated_bytes_are_a_typed_error(channel: grpc.Channel, method: str, raw: bytes) -> None:
    check_refused(channel, method, raw, ("INVALID_ARGUMENT", "message", "bytes are not a whole kilohive.v1."))


def test_an_oversize_message_is_refused_with_the_limit(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "Forward", b"\0" * (MAX_MESSAGE_BYTES + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_MESSAGE_BYTES) in str(caught.value.details())
    assert_serves(channel)


def test_an_expired_deadline_is_a_status_and_steps_nothing(swarm: TestSwarm, channel: grpc.Channel) -> None:
    runtime = swarm.hosts[0].runtime
    release, entered = threading.Event(), threading.Event()
    runtime.call(lambda: hold(entered, release))
    assert entered.wait(TIMEOUT_S)
    before = {block_id: block.version for block_id, block in runtime.blocks.items()}
    raw = backward(request_id=b"too late 1234567").SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "Backward", raw, timeout_s=0.3)
    release.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert_serves(channel)
    assert {block_id: block.version for block_id, block in runtime.blocks.items()} == before


def test_describe_lists_blocks_and_versions(channel: grpc.Channel) -> None:
    answer = pb.DescribeResponse.FromString(call(channel, "Describe", b""))
    assert [(b.layer, b.block, b.n_experts) for b in answer.blocks] == [(0, b, 4) for b in range(4)]
    assert answer.run_id == MANIFEST.run_id


def test_health_and_reflection_answer(channel: grpc.Channel) -> None:
    raw = health_pb2.HealthCheckRequest(service="kilohive.v1.Expert").SerializeToString()
    answer = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)(raw, timeout=TIMEOUT_S)
    assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING
    asked = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    answers = channel.stream_stream(method, bytes, bytes)(iter([asked]), timeout=TIMEOUT_S)
    listed = reflection_pb2.ServerReflectionResponse.FromString(next(iter(answers))).list_services_response
    assert "kilohive.v1.Expert" in [service.name for service in listed.service]


def test_a_backward_is_told_its_age_and_the_forward_its_version(swarm: TestSwarm, channel: grpc.Channel) -> None:
    versions = {block_id.block: block.version for block_id, block in swarm.hosts[0].blocks.items()}
    # Experts 0, 1 and 2: all of block 0.
    answer = pb.ForwardResponse.FromString(call(channel, "Forward", forward().SerializeToString()))
    assert answer.version == versions[0]
    for age, request_id in enumerate((b"age 0 1234567890", b"age 1 1234567890")):
        raw = backward(request_id=request_id, version=versions[0]).SerializeToString()
        result = pb.BackwardResponse.FromString(call(channel, "Backward", raw))
        assert (result.stepped, result.staleness) == (True, age)
    # Whoever claims to come from the future is not old.
    raw = backward(request_id=b"age ? 1234567890", version=2**64 - 1).SerializeToString()
    assert pb.BackwardResponse.FromString(call(channel, "Backward", raw)).staleness == 0


def test_gradients_only_are_answered_and_step_nothing(swarm: TestSwarm, channel: grpc.Channel) -> None:
    block = swarm.hosts[0].blocks[BlockId(0, 0)]
    before = block.version
    raw = backward(request_id=b"quiet 1234567890", version=before, no_step=True).SerializeToString()
    quiet = pb.BackwardResponse.FromString(call(channel, "Backward", raw))
    assert (quiet.stepped, block.version) == (False, before)
    assert list(quiet.grad_tokens_TD.shape) == [3, 16]
    raw = backward(request_id=b"quiet 1234567890", version=before).SerializeToString()
    loud = pb.BackwardResponse.FromString(call(channel, "Backward", raw))
    assert (loud.stepped, block.version) == (True, before + 1)
    assert loud.grad_tokens_TD == quiet.grad_tokens_TD


def test_a_block_that_left_is_refused_until_it_comes_back(swarm: TestSwarm, channel: grpc.Channel) -> None:
    runtime = swarm.hosts[0].runtime
    block = runtime.remove_block(BlockId(0, 0)).result(TIMEOUT_S)
    try:
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, "Forward", forward().SerializeToString())
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "expert 0 of layer 0 is not hosted here" in str(caught.value.details())
    finally:
        runtime.add_block(block).result(TIMEOUT_S)
    assert_serves(channel)


def test_a_host_without_blocks_answers_and_refuses() -> None:
    with running_swarm(MANIFEST, n_hosts=0) as swarm:
        empty = swarm.add_host("empty", [])
        with plain_channel(empty.server.endpoint) as channel:
            assert not pb.DescribeResponse.FromString(call(channel, "Describe", b"")).blocks
            with pytest.raises(grpc.RpcError) as caught:
                call(channel, "Forward", forward().SerializeToString())
    assert "no block of layer 0 is hosted here" in str(caught.value.details())


async def test_one_server_serves_several_services_each_with_its_health() -> None:
    names = ("kilohive.test.One", "kilohive.test.Two")
    handlers = [echo_handler(name) for name in names]
    server = NodeServer(handlers, names, "127.0.0.1", 0, PLAIN)
    await server.start()
    try:
        async with plain_aio_channel(server.endpoint) as channel:
            for name in names:
                request = pb.DescribeRequest(run_id=name)
                answer = await ask(channel, f"/{name}/Echo", request.SerializeToString())
                assert pb.DescribeRequest.FromString(answer) == request
                check = health_pb2.HealthCheckRequest(service=name).SerializeToString()
                raw = await ask(channel, "/grpc.health.v1.Health/Check", check)
                assert health_pb2.HealthCheckResponse.FromString(raw).status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.drain(0)


async def test_a_bug_in_a_handler_is_logged_and_named_by_its_type_alone(caplog: pytest.LogCaptureFixture) -> None:
    counts = CallCounts()

    async def broken(request: pb.DescribeRequest, timeout_s: float) -> pb.DescribeResponse:
        raise ZeroDivisionError("a secret of ours")

    server = NodeServer(
        [handler_of("kilohive.test.One", unary(pb.DescribeRequest, broken, counts))], [], "127.0.0.1", 0, PLAIN
    )
    await server.start()
    try:
        async with plain_aio_channel(server.endpoint) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(channel, "/kilohive.test.One/Echo", b"")
    finally:
        await server.drain(0)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "the node failed: ZeroDivisionError"
    assert "a secret of ours" in caplog.text
    assert (counts.ok, counts.refused) == (0, 1)


def echo_handler(name: str) -> grpc.GenericRpcHandler:
    async def echo(request: pb.DescribeRequest, timeout_s: float) -> pb.DescribeRequest:
        return request

    return handler_of(name, unary(pb.DescribeRequest, echo, CallCounts()))


def handler_of(name: str, call: Callable[[bytes, Any], Awaitable[bytes]]) -> grpc.GenericRpcHandler:
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Echo": grpc.unary_unary_rpc_method_handler(call)}
    return grpc.method_handlers_generic_handler(name, methods)


async def ask(channel: grpc.aio.Channel, method: str, raw: bytes) -> bytes:
    answer: bytes = await channel.unary_unary(method, bytes, bytes)(raw, timeout=TIMEOUT_S)
    return answer


def test_a_port_in_use_is_one_clear_sentence(swarm: TestSwarm) -> None:
    host = swarm.hosts[0]
    port = int(host.server.endpoint.rsplit(":", 1)[1])
    loop = LoopThread()

    async def start() -> None:
        server = NodeServer((host.service.handler(),), (SERVICE_NAME,), "127.0.0.1", port, PLAIN)
        try:
            await server.start()
        finally:
            await server.drain(0)

    try:
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}: the port is in use"):
            loop.call(start())
    finally:
        loop.close()


def check_refused(channel: grpc.Channel, method: str, raw: bytes, wanted: tuple[str, str, str]) -> None:
    status, field, problem = wanted
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, raw)
    error = caught.value
    assert error.code().name == status
    metadata: list[Any] = list(error.trailing_metadata() or ())
    assert ("kilohive-field", field) in [(row.key, row.value) for row in metadata]
    assert problem in str(error.details())
    assert "Traceback" not in str(error.details())
    assert_serves(channel)


def assert_serves(channel: grpc.Channel) -> None:
    answer = pb.ForwardResponse.FromString(call(channel, "Forward", forward().SerializeToString()))
    assert list(answer.combined_TD.shape) == [3, 16]

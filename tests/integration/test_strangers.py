"""What docs/threats.md says that a stranger can do to calls today: shown, not hoped. "Join" will change this file."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import TooFewExpertsError
from node.host.serving.runtime import RuntimeConfig
from node.model.pairs import Pairs
from node.rpc.expert_codec import encode_inputs
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.remote_moe import RemoteMoE
from protocol import expert_pb2 as pb
from protocol.manifest import BlockId, all_blocks
from protocol.tensors import encode
from tests.support.channels import plain_channel
from tests.support.swarm_parts import TestHost, running_swarm, small_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

TIMEOUT_S = 10.0
MANIFEST = small_manifest()
BLOCKS = [block for block in all_blocks(MANIFEST.model) if block.layer == 0]


def gate_seed() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def inputs(value: float = 1.0) -> pb.Inputs:
    pairs = Pairs(torch.arange(3), torch.arange(3), torch.ones(3))
    return encode_inputs(torch.full((3, 16), value), pairs, MANIFEST.codec)


def send(host: TestHost, method: str, request: pb.ForwardRequest | pb.BackwardRequest) -> bytes:
    with plain_channel(host.server.endpoint) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/kilohive.v1.Expert/{method}")
        answer: bytes = call(request.SerializeToString(), timeout=TIMEOUT_S)
    return answer


def change_weights(host: TestHost, change: Callable[[torch.Tensor], object]) -> None:
    def run() -> None:
        for block in host.blocks.values():
            change(block.params["w_out"])

    host.runtime.call(run).result(TIMEOUT_S)


def test_whoever_reaches_a_host_steps_its_experts_but_no_further_than_the_learning_rate() -> None:
    with running_swarm(MANIFEST, n_hosts=0) as swarm:
        host = swarm.add_host("honest", BLOCKS)
        block = host.blocks[BlockId(0, 0)]
        before = {name: weights.clone() for name, weights in block.params.items()}
        request = pb.BackwardRequest(
            run_id=MANIFEST.run_id,
            request_id=b"mallory's request"[:16],
            layer=0,
            inputs=inputs(),
            grad_combined_TD=encode(torch.full((3, 16), 1e10), MANIFEST.codec),
        )
        answer = pb.BackwardResponse.FromString(send(host, "Backward", request))
        assert answer.stepped
        assert block.version == 1
        for name, weights in block.params.items():
            moved = (weights - before[name]).abs().max()
            assert 0 < moved <= 1.01 * MANIFEST.optimizer.expert_lr, name


def test_the_answers_of_a_stranger_who_announces_a_block_are_believed() -> None:
    with running_swarm(MANIFEST, n_hosts=0) as swarm:
        stranger = swarm.add_host("stranger", BLOCKS)
        layer = RemoteMoE(swarm.dispatcher, 0, gate_seed()).eval()
        x_TD = torch.randn(5, 16, generator=gate_seed())
        honest_TD = layer(x_TD).detach()
        change_weights(stranger, lambda w_EHD: w_EHD.mul_(1000))
        torch.testing.assert_close(layer(x_TD).detach(), 1000 * honest_TD, rtol=1e-3, atol=1e-3)
        assert swarm.dispatcher.calls_failed == 0


def test_an_answer_that_is_not_finite_is_a_failed_call() -> None:
    with running_swarm(MANIFEST, n_hosts=0) as swarm:
        stranger = swarm.add_host("stranger", BLOCKS)
        change_weights(stranger, lambda w_EHD: w_EHD.fill_(float("nan")))
        with pytest.raises(TooFewExpertsError, match="peers that failed: stranger"):
            RemoteMoE(swarm.dispatcher, 0, gate_seed())(torch.randn(5, 16))
        assert swarm.directory.failures == ["stranger"]


def test_a_stranger_can_push_out_kept_inputs_which_costs_bytes_and_no_step() -> None:
    capacity_for_one = RuntimeConfig(keep_inputs_bytes=4096)
    with running_swarm(MANIFEST, n_hosts=0) as swarm:
        host = swarm.add_host("honest", BLOCKS, capacity_for_one)
        y_TD = RemoteMoE(swarm.dispatcher, 0, gate_seed())(torch.randn(20, 16, requires_grad=True))
        kept = host.runtime.kept_bytes
        for number in range(20):
            request_id = number.to_bytes(16, "big")
            send(
                host,
                "Forward",
                pb.ForwardRequest(
                    run_id=MANIFEST.run_id, request_id=request_id, layer=0, inputs=inputs(), keep_inputs=True
                ),
            )
        assert 0 < kept <= 4096
        assert host.runtime.kept_bytes <= 4096
        refused = host.service.calls_refused
        y_TD.sum().backward()
        assert host.service.calls_refused == refused + 1, "the host asked for the inputs again"
        assert swarm.dispatcher.calls_failed == 0
        assert max(block.version for block in host.blocks.values()) == 1


def test_a_peer_that_accepts_and_never_answers_costs_one_deadline_and_is_then_avoided() -> None:
    config = DispatchConfig(call_timeout_s=1.0)
    with running_swarm(MANIFEST, n_hosts=0, config=config) as swarm, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        swarm.add_host("honest", BLOCKS[1:])
        swarm.directory.add("silent", f"127.0.0.1:{silent.getsockname()[1]}", BLOCKS[:1])
        layer = RemoteMoE(swarm.dispatcher, 0, gate_seed()).eval()
        x_TD = torch.randn(64, 16, generator=gate_seed())
        began_s = time.monotonic()
        # Some of the 64 tokens chose two experts of the silent peer: a trainer would try the micro-batch again.
        with pytest.raises(TooFewExpertsError, match="peers that failed: silent"):
            layer(x_TD)
        assert 1.0 <= time.monotonic() - began_s < 3.0
        layer(x_TD)
        assert swarm.directory.failures == ["silent"], "the second time nobody asked it"


def test_a_request_id_that_was_overheard_steps_once_whoever_sends_it_first() -> None:
    with running_swarm(MANIFEST, n_hosts=0) as swarm:
        host = swarm.add_host("honest", BLOCKS)
        request = pb.BackwardRequest(
            run_id=MANIFEST.run_id,
            request_id=b"overheard by him",
            layer=0,
            inputs=inputs(),
            grad_combined_TD=encode(torch.zeros(3, 16), MANIFEST.codec),
        )
        assert pb.BackwardResponse.FromString(send(host, "Backward", request)).stepped
        request.grad_combined_TD.CopyFrom(encode(torch.ones(3, 16), MANIFEST.codec))
        ours = pb.BackwardResponse.FromString(send(host, "Backward", request))
        assert not ours.stepped
        assert list(ours.grad_tokens_TD.shape) == [3, 16]

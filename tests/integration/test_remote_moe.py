"""RemoteMoE over real gRPC: gradients, parity with LocalMoE, failures inside a step."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import DrainingError, TooFewExpertsError
from experiments.live.processes import wait_until
from node.host.serving.runtime import RuntimeConfig
from node.model.gate import HashGate, TopKGate
from node.model.moe import LocalExperts, LocalMoE
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.remote_moe import RemoteMoE
from node.trainer.swarm_client import SwarmClient
from protocol.manifest import BlockId, all_blocks
from tests.support.swarm_parts import forget, running_swarm, small_manifest


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def tokens(n: int = 10, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_gradcheck_of_tokens_and_gate_in_float64_against_hosts_on_loopback() -> None:
    # A learning rate of 0: the hosts step on every backward, and gradcheck wants the same function throughout.
    manifest = small_manifest(codec="fp64", dtype="fp64", optimizer={"expert_lr": 0.0})
    with running_swarm(manifest, n_hosts=2) as swarm:
        layer = RemoteMoE(swarm.dispatcher, 0, seeded()).double().eval()
        names = [name for name, _ in layer.named_parameters()]
        values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

        def function(x_TD: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            called = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x_TD,))
            assert isinstance(called, torch.Tensor)
            return called

        assert torch.autograd.gradcheck(function, (tokens(4).requires_grad_(), *values), eps=1e-6, atol=1e-6)
        assert swarm.dispatcher.calls_failed == 0


CODES = {"gate_reads": "tokens", "gate_heads": 2, "gate_score": "softmax", "balance": "proportional"}


@pytest.mark.parametrize(
    ("gate", "kind", "reads"),
    [
        ("topk", "ffn", {}),
        ("product_key", "ffn", {}),
        ("topk", "lora", {}),
        ("topk", "ffn", CODES),
        ("product_key", "ffn", CODES),
        ("hash", "ffn", CODES),
    ],
)
def test_a_remote_layer_equals_the_local_one_through_steps(gate: str, kind: str, reads: dict[str, object]) -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64", model={"gate": gate, "expert_kind": kind, **reads})
    code_TQD = torch.randn(10, 2, 16, dtype=torch.float64, generator=seeded()) if reads else None
    with running_swarm(manifest, n_hosts=3) as swarm:
        local_experts = LocalExperts(manifest)
        remote = RemoteMoE(swarm.dispatcher, 1, seeded()).double()
        local = LocalMoE(local_experts, 1, seeded()).double()
        for step in range(5):
            x_TD = tokens() + step
            outputs = []
            for layer in (remote, local):
                x = x_TD.clone().requires_grad_()
                y = x + layer(x, code_TQD)
                grads = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
                layer.balance()
                outputs.append((y.detach(), *grads))
            for ours, reference in zip(*outputs, strict=True):
                torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
        for block in local_experts.blocks[1]:
            theirs = swarm.block(block.id)
            assert theirs.version == block.version
            for name, weights in block.params.items():
                torch.testing.assert_close(theirs.params[name], weights, rtol=0, atol=1e-12)
                assert bool(weights.any())


def test_a_layer_of_ones_own_learns_to_choose_where_the_run_hashes_tokens_unless_told() -> None:
    manifest = small_manifest(model={"gate": "hash", **CODES})
    swarm: Any = SimpleNamespace(manifest=manifest, dispatcher=SimpleNamespace(manifest=manifest))
    assert isinstance(SwarmClient.moe_layer(swarm, 0).gate, TopKGate)
    assert isinstance(SwarmClient.moe_layer(swarm, 0, gate="hash").gate, HashGate)
    swarm.manifest = small_manifest(model={"gate": "product_key", **CODES})
    layer = SwarmClient.moe_layer(swarm, 0)
    assert dict(layer.gate.named_parameters()).keys() == {"query_weight", "sub_keys_2SC"}, "it reads the layer's input"


def test_one_request_per_peer_and_layer() -> None:
    with running_swarm(small_manifest(), n_hosts=2) as swarm:
        RemoteMoE(swarm.dispatcher, 0, seeded())(tokens(200, torch.float32))
        assert swarm.dispatcher.calls_ok == 2


def test_leading_dimensions_are_kept() -> None:
    with running_swarm(small_manifest(), n_hosts=1) as swarm:
        layer = RemoteMoE(swarm.dispatcher, 0, seeded())
        assert layer(torch.randn(2, 3, 16)).shape == (2, 3, 16)


def test_a_host_that_is_gone_is_dropped_inside_the_step_and_the_rest_renormalised() -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64", model={"experts_per_token": 8})
    with running_swarm(manifest, n_hosts=4) as swarm:
        layer = RemoteMoE(swarm.dispatcher, 0, seeded()).double().eval()
        x_TD = tokens(6)
        choice = layer.gate(x_TD)
        gone = swarm.hosts[1]
        gone.stop()
        y_TD = layer(x_TD.requires_grad_())
        y_TD.sum().backward()

        reference = LocalExperts(manifest)
        dead = torch.cat(
            [torch.tensor(list(manifest.model.block_experts(b.block))) for b in gone.blocks if b.layer == 0]
        )
        alive_TK = ~torch.isin(choice.expert_ids_TK, dead)
        assert bool((~alive_TK).any())
        ids_TK = choice.expert_ids_TK.masked_fill(~alive_TK, -1)
        weights_TK = choice.weights_TK.detach() * alive_TK
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        wanted = reference.forward(0, x_TD.detach(), ids_TK, weights_TK, keep=False)
        torch.testing.assert_close(y_TD.detach(), wanted.combined_TD, rtol=1e-9, atol=1e-9)
        assert swarm.directory.failures == ["peer1"]


def test_another_replica_is_tried_inside_the_step() -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64")
    with running_swarm(manifest, n_hosts=1) as swarm:
        swarm.add_host("replica", all_blocks(manifest.model))
        swarm.hosts[0].stop()
        layer = RemoteMoE(swarm.dispatcher, 0, seeded()).double()
        for _ in range(4):
            y_TD = layer(tokens(20))
            assert bool((y_TD.abs().sum(1) > 0).all())
        assert swarm.dispatcher.calls_failed == 1


def test_a_backward_goes_to_another_replica_when_the_first_is_gone() -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64")
    with running_swarm(manifest, n_hosts=1) as swarm:
        layer = RemoteMoE(swarm.dispatcher, 0, seeded()).double()
        x_TD = tokens(20).requires_grad_()
        y_TD = layer(x_TD)
        other = swarm.add_host("replica", all_blocks(manifest.model))
        swarm.hosts[0].stop()
        # Nobody to connect to proves that the first replica took no step; a connection that breaks would not.
        forget(swarm, swarm.hosts[0])
        (grad_TD,) = torch.autograd.grad(y_TD.sum(), x_TD)
        assert bool((grad_TD.abs().sum(1) > 0).all())
        assert max(block.version for block in other.blocks.values()) == 1


def test_inputs_that_a_host_dropped_are_sent_again_and_step_once() -> None:
    with running_swarm(small_manifest(codec="fp64", dtype="fp64"), n_hosts=0) as swarm:
        host = swarm.add_host("p", all_blocks(swarm.manifest.model), RuntimeConfig(keep_inputs_bytes=1))
        layer = RemoteMoE(swarm.dispatcher, 0, seeded()).double()
        layer(tokens(20).requires_grad_()).sum().backward()
        assert max(block.version for block in host.blocks.values()) == 1
        assert swarm.dispatcher.calls_failed == 0


def test_too_few_experts_names_layer_and_peers() -> None:
    with running_swarm(small_manifest(), n_hosts=1, config=DispatchConfig(k_min=2)) as swarm:
        layer = RemoteMoE(swarm.dispatcher, 1, seeded())
        swarm.hosts[0].stop()
        with pytest.raises(TooFewExpertsError, match=r"layer 1: fewer than 2 experts .* peers that failed: peer0"):
            layer(tokens(3, torch.float32))
        with pytest.raises(TooFewExpertsError, match="layer 1: none of its 16 experts has a live replica"):
            layer(tokens(3, torch.float32))


def test_a_peer_that_keeps_failing_is_tried_ever_more_rarely() -> None:
    with running_swarm(small_manifest(), n_hosts=1, config=DispatchConfig(avoid_failed_s=0.05)) as swarm:
        layer = RemoteMoE(swarm.dispatcher, 0, seeded())
        swarm.hosts[0].stop()
        for _ in range(4):
            swarm.directory.avoided.clear()
            swarm.directory.generation += 1
            with pytest.raises(TooFewExpertsError):
                layer(tokens(3, torch.float32))
            time.sleep(swarm.directory.retry_after_s[-1])  # it may be tried again then
        assert swarm.directory.retry_after_s == [0.05, 0.1, 0.2, 0.4]


def test_the_gate_chooses_only_among_experts_with_a_live_replica() -> None:
    with running_swarm(small_manifest(), n_hosts=0) as swarm:
        host = swarm.add_host("p", [BlockId(0, 2)])
        layer = RemoteMoE(swarm.dispatcher, 0, seeded())
        layer(tokens(50, torch.float32))
        assert swarm.dispatcher.calls_failed == 0
        assert host.runtime.tokens_total == 50


def test_many_threads_may_use_one_layer_at_once() -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64", optimizer={"expert_lr": 0.0})
    with running_swarm(manifest, n_hosts=2) as swarm, ThreadPoolExecutor(4) as pool:
        layer = RemoteMoE(swarm.dispatcher, 0, seeded()).double().eval()
        batches = [tokens(8) + i for i in range(12)]
        alone = [layer(x_TD).detach() for x_TD in batches]
        together = list(pool.map(lambda x_TD: layer(x_TD).detach(), batches))
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_closing_the_dispatcher_releases_a_thread_that_waits() -> None:
    with running_swarm(small_manifest(), n_hosts=1) as swarm:
        host, release, entered = swarm.hosts[0], threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            release.wait(10)

        host.runtime.call(hold)
        assert entered.wait(10)
        layer = RemoteMoE(swarm.dispatcher, 0, seeded())
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(layer, tokens(4, torch.float32))
            wait_until(lambda: swarm.dispatcher.in_flight > 0, "the layer waits for its host", 10)
            swarm.dispatcher.close()
            with pytest.raises(DrainingError):
                waiting.result(5)
        release.set()

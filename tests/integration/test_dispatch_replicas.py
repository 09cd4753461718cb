"""Several replicas per block over real gRPC: failover, hedges, and backwards that teach one replica once.

The numbers are compared with LocalMoE's throughout: whoever answers, sums and gradients are the same.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import UnavailableError
from experiments.live.processes import wait_until
from node.model.moe import LocalExperts, LocalMoE
from node.model.pairs import Pairs
from node.rpc.expert_codec import encode_inputs
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.dispatch.peer_costs import MIN_SAMPLES
from node.trainer.remote_moe import RemoteMoE
from protocol import expert_pb2 as pb
from protocol.limits import REQUEST_ID_BYTES
from protocol.manifest import all_blocks
from protocol.security import NotConnectedError
from tests.support.swarm_parts import forget, running_swarm, small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.model.moe import MoE
    from protocol.endpoints import Address
    from protocol.manifest import BlockId, Manifest
    from tests.support.swarm_parts import TestHost, TestSwarm

LAYER = 1
EXACT = small_manifest(codec="fp64", dtype="fp64")
BLOCKS = [block for block in all_blocks(EXACT.model) if block.layer == LAYER]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def tokens(n: int = 40) -> torch.Tensor:
    return torch.randn(n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def remote(swarm: TestSwarm) -> RemoteMoE:
    return RemoteMoE(swarm.dispatcher, LAYER, seeded()).double()


def pass_through(layer: MoE, x_TD: torch.Tensor, y_TD: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Output of a layer for x_TD (y_TD, if it was computed before) and gradients of tokens and gate."""
    if y_TD is None:
        y_TD = layer(x_TD)
    return [y_TD.detach(), *torch.autograd.grad(y_TD.square().sum(), (x_TD, *layer.parameters()))]


def assert_as_local(manifest: Manifest, results: list[torch.Tensor], local: LocalExperts | None = None) -> None:
    layer = LocalMoE(local or LocalExperts(manifest), LAYER, seeded()).double()
    for ours, reference in zip(results, pass_through(layer, tokens().requires_grad_()), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def steps_of(host: TestHost) -> dict[BlockId, int]:
    return {block_id: block.version for block_id, block in host.blocks.items()}


def stop_and_hang_up(swarm: TestSwarm, host: TestHost) -> None:
    """The host is gone, and the trainer's connection with it: the next call finds nobody to connect to."""
    host.stop()
    forget(swarm, host)


def seem_busy(swarm: TestSwarm, peer_ids: set[str]) -> None:
    """The directory knows of queues there: while no peer has answered yet, the others are called first."""
    for block_id, replicas in swarm.directory.table.items():
        swarm.directory.table[block_id] = tuple(
            replace(r, queue_tokens=10_000) if r.peer_id in peer_ids else r for r in replicas
        )


@contextmanager
def frozen(host: TestHost) -> Iterator[None]:
    """The host takes requests and answers none."""
    release, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        release.wait(60)

    host.runtime.call(hold)
    assert entered.wait(10)
    try:
        yield
    finally:
        release.set()


def test_failover_over_several_replicas_changes_neither_sums_nor_gradients() -> None:
    with running_swarm(EXACT, n_hosts=0) as swarm:
        gone = swarm.add_host("gone", BLOCKS)
        gone.stop()
        layer, x_TD = remote(swarm), tokens().requires_grad_()
        swarm.add_host("even", BLOCKS[::2])
        swarm.add_host("odd", BLOCKS[1::2])
        seem_busy(swarm, {"even", "odd"})
        assert_as_local(EXACT, pass_through(layer, x_TD))
        assert swarm.directory.failures == ["gone"]
        assert steps_of(swarm.hosts[1]) | steps_of(swarm.hosts[2]) == dict.fromkeys(BLOCKS, 1)


def test_a_peer_that_moved_a_block_away_goes_on_answering_for_the_others() -> None:
    with running_swarm(EXACT, n_hosts=0) as swarm:
        mover = swarm.add_host("mover", BLOCKS)
        layer, x_TD = remote(swarm), tokens().requires_grad_()
        y_TD = layer(x_TD)
        mover.runtime.remove_block(BLOCKS[2]).result(10)
        heir = swarm.add_host("heir", [BLOCKS[2]])
        local = LocalExperts(EXACT)
        assert_as_local(EXACT, pass_through(layer, x_TD, y_TD), local)
        assert steps_of(mover) == dict.fromkeys((BLOCKS[0], BLOCKS[1], BLOCKS[3]), 1)
        assert steps_of(heir) == {BLOCKS[2]: 1}
        assert_as_local(EXACT, pass_through(layer, tokens().requires_grad_()), local)
        assert swarm.directory.failures == []


def test_a_backward_that_finds_its_peer_gone_is_split_over_the_others_which_step_once() -> None:
    with running_swarm(EXACT, n_hosts=0) as swarm:
        gone = swarm.add_host("gone", BLOCKS)
        layer, x_TD = remote(swarm), tokens().requires_grad_()
        y_TD = layer(x_TD)
        others = swarm.add_host("a", BLOCKS[:1]), swarm.add_host("b", BLOCKS[1:])
        stop_and_hang_up(swarm, gone)
        assert_as_local(EXACT, pass_through(layer, x_TD, y_TD))
        assert steps_of(others[0]) | steps_of(others[1]) == dict.fromkeys(BLOCKS, 1)


def test_who_does_not_teach_gets_the_same_gradients_and_steps_nobody() -> None:
    with running_swarm(EXACT, n_hosts=0, config=DispatchConfig(teach=False)) as swarm:
        host = swarm.add_host("host", BLOCKS)
        assert_as_local(EXACT, pass_through(remote(swarm), tokens().requires_grad_()))
        assert steps_of(host) == dict.fromkeys(BLOCKS, 0)


def test_an_update_whose_answer_was_lost_is_not_made_a_second_time_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_swarm(EXACT, n_hosts=0) as swarm:
        first = swarm.add_host("first", BLOCKS)
        layer, x_TD = remote(swarm), tokens().requires_grad_()
        y_TD = layer(x_TD)
        other = swarm.add_host("other", BLOCKS)
        call, requests = swarm.client.backward, list[pb.BackwardRequest]()

        async def losing(
            address: Address, request: pb.BackwardRequest, timeout_s: float, *, patient: bool
        ) -> pb.BackwardResponse:
            requests.append(request)
            answer = await call(address, request, timeout_s, patient=patient)
            if address == first.address:
                raise UnavailableError("Socket closed")
            return answer

        monkeypatch.setattr(swarm.client, "backward", losing)
        assert_as_local(EXACT, pass_through(layer, x_TD, y_TD))
        assert steps_of(first) == dict.fromkeys(BLOCKS, 1)
        assert steps_of(other) == dict.fromkeys(BLOCKS, 0)
        # The second is the repeat, whose inputs the first has used up; the third brings them.
        assert [request.no_step for request in requests] == [False, False, False, True]


def test_a_backward_at_a_frozen_peer_gets_its_gradients_elsewhere_inside_the_deadline() -> None:
    with running_swarm(EXACT, n_hosts=0, config=DispatchConfig(call_timeout_s=3.0)) as swarm:
        peer = swarm.add_host("frozen", BLOCKS)
        layer, x_TD = remote(swarm), tokens().requires_grad_()
        y_TD = layer(x_TD)
        other = swarm.add_host("other", BLOCKS)
        with frozen(peer):
            assert_as_local(EXACT, pass_through(layer, x_TD, y_TD))
        peer.runtime.call(lambda: None).result(10)
        assert steps_of(other) == dict.fromkeys(BLOCKS, 0)
        assert max(steps_of(peer).values()) <= 1
        assert swarm.directory.failures == ["frozen"]


def test_the_forwards_version_goes_back_with_the_gradient_and_the_staleness_is_told() -> None:
    with running_swarm(EXACT, n_hosts=0) as swarm:
        swarm.add_host("host", BLOCKS)
        layer = remote(swarm)
        early, late = layer(tokens().requires_grad_()), layer(tokens().requires_grad_())
        early.sum().backward()
        late.sum().backward()
        assert swarm.dispatcher.take_staleness() == (0.5, 1)
        assert swarm.dispatcher.take_staleness() == (0.0, 0)
        layer(tokens().requires_grad_()).sum().backward()
        assert swarm.dispatcher.take_staleness() == (0.0, 0)


def test_a_hedge_wins_against_a_frozen_peer_and_the_backward_goes_to_those_who_answered() -> None:
    with running_swarm(EXACT, n_hosts=2, config=DispatchConfig(hedge=True)) as swarm:
        layer, x_TD = remote(swarm), tokens().requires_grad_()
        with torch.no_grad():
            for _ in range(MIN_SAMPLES):
                layer(tokens())
        sent = swarm.dispatcher.hedges_sent
        late = swarm.add_host("late", BLOCKS)  # nothing is known of it yet, so it is tried first
        with frozen(late):
            results = pass_through(layer, x_TD)
        assert_as_local(EXACT, results)
        assert swarm.dispatcher.hedges_sent == sent + 1
        assert swarm.dispatcher.hedges_won == 1
        assert swarm.directory.failures == []
        late.runtime.call(lambda: None).result(10)
        assert steps_of(late) == dict.fromkeys(BLOCKS, 0)
        assert {b: v for host in swarm.hosts[:2] for b, v in steps_of(host).items() if b.layer == LAYER} == (
            dict.fromkeys(BLOCKS, 1)
        )


def test_without_the_option_a_late_forward_is_waited_for() -> None:
    with running_swarm(EXACT, n_hosts=1) as swarm, ThreadPoolExecutor(1) as pool:
        layer = remote(swarm)
        with torch.no_grad():
            for _ in range(MIN_SAMPLES):
                layer(tokens())
        late = swarm.add_host("late", BLOCKS)
        with frozen(late):
            waiting = pool.submit(layer, tokens())
            wait_until(lambda: late.runtime.queue_tokens > 0, "the request is at the frozen host", 10)
        assert bool((waiting.result(20).abs().sum(1) > 0).all())
        assert swarm.dispatcher.take_pairs_by_peer()["late"] == tokens().shape[0] * EXACT.model.experts_per_token
        assert swarm.dispatcher.hedges_sent == 0


def test_many_threads_over_two_replicas_of_everything_with_hedges_give_the_same_sums() -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64", optimizer={"expert_lr": 0.0})
    with running_swarm(manifest, n_hosts=2, config=DispatchConfig(hedge=True)) as swarm, ThreadPoolExecutor(4) as pool:
        swarm.add_host("replica", all_blocks(manifest.model))
        layer = RemoteMoE(swarm.dispatcher, LAYER, seeded()).double().eval()
        batches = [tokens(8) + i for i in range(60)]
        together = list(pool.map(lambda x_TD: layer(x_TD).detach(), batches))
        local = LocalMoE(LocalExperts(manifest), LAYER, seeded()).double().eval()
        for x_TD, ours in zip(batches, together, strict=True):
            torch.testing.assert_close(ours, local(x_TD).detach(), rtol=1e-10, atol=1e-10)
        assert set(swarm.dispatcher.take_pairs_by_peer()) == {"peer0", "peer1", "replica"}
        assert swarm.dispatcher.calls_failed == 0


def test_only_a_call_that_never_left_says_that_no_connection_was_made() -> None:
    with running_swarm(EXACT, n_hosts=1) as swarm:
        host = swarm.hosts[0]
        expert = next(iter(host.blocks.values())).experts.start
        pair = Pairs(torch.tensor([0]), torch.tensor([expert]), torch.ones(1))
        request = pb.ForwardRequest(
            run_id=EXACT.run_id,
            request_id=bytes(REQUEST_ID_BYTES),
            layer=next(iter(host.blocks)).layer,
            inputs=encode_inputs(tokens(1), pair, EXACT.codec),
        )
        with frozen(host):
            waiting = asyncio.run_coroutine_threadsafe(
                swarm.client.forward(host.address, request, 20.0), swarm.loop.loop
            )
            wait_until(lambda: host.runtime.queue_tokens > 0, "the request is at the host", 10)
            swarm.loop.call(host.server.drain(0))
            assert type(waiting.exception(20)) is UnavailableError
        forget(swarm, host)
        with pytest.raises(NotConnectedError):
            swarm.loop.call(swarm.client.forward(host.address, request, 20.0))

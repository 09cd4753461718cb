"""Calls that are delayed, doubled, dropped or damaged on their way, against real hosts: a step goes on or says why."""

from __future__ import annotations

import asyncio
import math
import struct
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import DeadlineError, TooFewExpertsError, UnavailableError
from experiments.live.faulty_client import Faults, FaultyClient
from node.model.moe import LocalExperts, LocalMoE
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.remote_moe import RemoteMoE
from protocol import expert_pb2 as pb
from protocol.endpoints import Address
from tests.support.swarm_parts import PLAIN, running_swarm, small_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.model.moe import MoE
    from protocol.security import Caller

N_CALLS = 60


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def step(layer: MoE, number: int) -> torch.Tensor:
    x_TD = torch.randn(10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(number)).requires_grad_()
    y_TD: torch.Tensor = layer(x_TD)
    y_TD.square().sum().backward()
    assert x_TD.grad is not None
    return torch.cat([y_TD.detach(), x_TD.grad])


class EchoClient(FaultyClient):
    """Its hosts answer at once, with what they were sent."""

    def __init__(self, faults: Faults) -> None:
        super().__init__(faults, PLAIN.caller())
        self.delivered: list[bytes] = []

    async def _deliver(self, address: Address, method: str, raw: bytes, timeout_s: float) -> bytes:
        self.delivered.append(raw)
        await asyncio.sleep(0)
        return raw

    async def outcomes(self, n_calls: int, timeout_s: float = 5.0) -> list[str]:
        """What became of calls that were made one after the other, without waiting."""
        calls = [self._send(Address("host", "host:1"), "Forward", bytes([n] * 4), timeout_s) for n in range(n_calls)]
        ended = await asyncio.gather(*calls, return_exceptions=True)
        return [type(end).__name__ if isinstance(end, BaseException) else end.hex() for end in ended]


def test_every_request_twice_steps_the_experts_once() -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64")
    with running_swarm(manifest, 2, make_client=partial(FaultyClient, Faults(duplicate=1.0))) as swarm:
        experts = LocalExperts(manifest)
        remote, local = RemoteMoE(swarm.dispatcher, 0, seeded()).double(), LocalMoE(experts, 0, seeded()).double()
        for number in range(4):
            # Outputs alone: the answer that counts may be the second one's, from experts that have stepped.
            ours, wanted = (step(layer, number).chunk(2)[0] for layer in (remote, local))
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
        assert isinstance(swarm.client, FaultyClient)
        # More than the calls: the second of two backwards finds the inputs taken, and they are sent again.
        assert swarm.client.counts["duplicate"] > swarm.dispatcher.calls_ok > 0
        assert [swarm.block(block.id).version for block in experts.blocks[0]] == [
            block.version for block in experts.blocks[0]
        ]


class ThirdLostOnce(FaultyClient):
    """Every third message gets lost on its way; sent once more it arrives."""

    def __init__(self, caller: Caller) -> None:
        super().__init__(Faults(), caller)
        self._seen: set[bytes] = set()

    async def _send(self, address: Address, method: str, raw: bytes, timeout_s: float) -> bytes:
        if raw not in self._seen:
            self._seen.add(raw)
            if len(self._seen) % 3 == 0:
                self._fail("the first time")
        return await super()._send(address, method, raw, timeout_s)


def test_steps_are_exact_where_a_third_of_the_calls_gets_lost_once() -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64")
    with running_swarm(manifest, 4, make_client=ThirdLostOnce) as swarm:
        experts = LocalExperts(manifest)
        remote, local = RemoteMoE(swarm.dispatcher, 0, seeded()).double(), LocalMoE(experts, 0, seeded()).double()
        for number in range(12):
            torch.testing.assert_close(step(remote, number), step(local, number), rtol=1e-10, atol=1e-10)
        assert isinstance(swarm.client, ThirdLostOnce)
        assert swarm.client.counts["fail"] == len(swarm.client._seen) // 3 >= 24
        assert swarm.dispatcher.calls_failed == swarm.client.counts["fail"]


class Damaging(FaultyClient):
    """Every answer to a forward is damaged on its way."""

    def __init__(self, damage: Callable[[bytes], bytes], caller: Caller) -> None:
        super().__init__(Faults(), caller)
        self._damage = damage

    async def _send(self, address: Address, method: str, raw: bytes, timeout_s: float) -> bytes:
        answer = await super()._send(address, method, raw, timeout_s)
        if method != "Forward":
            return answer
        self.counts["corrupt"] += 1
        return self._damage(answer)


def with_first_number(answer: bytes, number: bytes) -> bytes:
    response = pb.ForwardResponse.FromString(answer)
    response.combined_TD.data = number + response.combined_TD.data[len(number) :]
    return response.SerializeToString()


def cut_short(answer: bytes) -> bytes:
    return answer[: len(answer) // 2]


def not_finite(answer: bytes) -> bytes:
    return with_first_number(answer, struct.pack("<d", math.inf))


def another_number(answer: bytes) -> bytes:
    return with_first_number(answer, struct.pack("<d", 0.25))


@pytest.mark.parametrize("damage", [cut_short, not_finite])
def test_a_damaged_answer_that_cannot_be_right_is_an_error_that_names_the_layer(
    damage: Callable[[bytes], bytes],
) -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64")
    with running_swarm(manifest, 2, make_client=partial(Damaging, damage)) as swarm:
        layer = RemoteMoE(swarm.dispatcher, 0, seeded()).double()
        for number in range(10):
            with pytest.raises(TooFewExpertsError, match="layer 0"):
                step(layer, number)
        assert isinstance(swarm.client, Damaging)
        assert swarm.client.counts["corrupt"] == 2, "each host is called once, and then avoided"
        assert swarm.dispatcher.calls_ok == 0


def test_a_damaged_answer_that_could_be_right_gives_numbers() -> None:
    manifest = small_manifest(codec="fp64", dtype="fp64")
    with running_swarm(manifest, 2, make_client=partial(Damaging, another_number)) as swarm:
        layer = RemoteMoE(swarm.dispatcher, 0, seeded()).double()
        for number in range(10):
            assert bool(step(layer, number).isfinite().all())
        assert isinstance(swarm.client, Damaging)
        assert swarm.client.counts["corrupt"] == 20
        assert swarm.dispatcher.calls_failed == 0


def test_a_host_that_never_answers_costs_the_deadline_and_no_more() -> None:
    config = DispatchConfig(call_timeout_s=0.3)
    with (
        running_swarm(small_manifest(), 1, config, partial(FaultyClient, Faults(silent=1.0))) as swarm,
        pytest.raises(TooFewExpertsError, match="peer0"),
    ):
        RemoteMoE(swarm.dispatcher, 0, seeded())(torch.randn(4, 16))


async def test_a_seed_decides_what_befalls_which_call() -> None:
    faults = Faults(fail=0.2, silent=0.1, duplicate=0.3, corrupt=0.2, delay_mean_s=0.001, seed=7)
    one, same, other = (EchoClient(f) for f in (faults, faults, Faults(**{**vars(faults), "seed": 8})))
    first = await one.outcomes(N_CALLS, 0.5)
    assert first == await same.outcomes(N_CALLS, 0.5) != await other.outcomes(N_CALLS, 0.5)
    assert one.counts == same.counts
    kinds = Counter(end for end in first if end in {UnavailableError.__name__, DeadlineError.__name__})
    assert kinds[UnavailableError.__name__] == one.counts["fail"] > 0
    assert kinds[DeadlineError.__name__] == one.counts["silent"] > 0
    sent = {bytes([n] * 4).hex() for n in range(N_CALLS)}
    assert sum(end not in sent for end in first if end not in kinds) == one.counts["corrupt"] > 0


async def test_delays_let_calls_overtake_each_other() -> None:
    client = EchoClient(Faults(delay_mean_s=0.02, seed=1))
    assert len(await client.outcomes(20)) == 20
    assert client.delivered != sorted(client.delivered)
    assert sorted(client.delivered) == [bytes([n] * 4) for n in range(20)]


async def test_an_answer_drains_no_faster_than_it_may() -> None:
    client, loop = EchoClient(Faults(drain_bytes_per_s=40.0)), asyncio.get_running_loop()
    started_s = loop.time()
    await client.outcomes(1)
    assert loop.time() - started_s >= 0.09


@pytest.mark.parametrize("wrong", [{"fail": 1.5}, {"silent": -0.1}, {"delay_mean_s": -1.0}])
def test_faults_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be from 0 to 1|negative"):
        Faults(**wrong)  # type: ignore[arg-type]

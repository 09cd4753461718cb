"""The loop that begins exchanges: with whom, when, what it tells, how it ends."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from common.errors import DeadlineError, OverloadedError, UnavailableError
from common.events import EventLog
from node.averaging.averager import BUSY_JITTER, JITTER, MAX_SHARE, Averager, AveragerConfig, pause_s
from node.averaging.pairing import BUSY_THERE, SLOW_HERE
from node.averaging.partners import FIRST_AVOID_S, FIRST_BUSY_S
from protocol.manifest import TRUNK
from tests.support.averager_parts import A, B, Swarm, holder, result

if TYPE_CHECKING:
    from node.averaging.exchange import ExchangeResult


@pytest.fixture
async def swarm() -> Swarm:
    return Swarm()


async def test_an_exchange_is_of_all_shared_blocks_and_is_told_whole(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A, B)
    assert swarm.averager.divergence(A) == 0.0
    done = await swarm.averager.exchange_once()
    assert done is not None
    assert [block.block for block in done.blocks] == [A, B]
    assert swarm.client.calls == [("p:4000", "p", (A, B), 7.0)]
    assert (swarm.averager.divergence(A), swarm.averager.divergence(B)) == (0.25, 0.5)
    assert swarm.averager.exchanged_bytes == 1000
    (event,) = swarm.events
    assert event.pop("t") > 0
    assert event == {
        "event": "exchange",
        "partner": "p",
        "dialled": True,
        "blocks": 2,
        "divergence_max": 0.5,
        "divergence_mean": 0.375,
        "clipped": 1,
        "refused": 0,
        "bytes": 1000,
        "seconds": 0.123,
        "problem": "",
    }


async def test_alone_or_without_replicas_there_is_nothing_to_do(swarm: Swarm) -> None:
    assert await swarm.averager.exchange_once() is None
    swarm.directory.listed += holder("p", A)
    swarm.replicas.held.clear()
    assert await swarm.averager.exchange_once() is None
    assert swarm.client.calls == []
    assert swarm.events == []


async def test_a_joiner_can_name_the_blocks_it_wants(swarm: Swarm) -> None:
    swarm.directory.listed += [*holder("p", A), *holder("q", A, B)]
    for _ in range(5):
        assert await swarm.averager.exchange_once({B})
    assert {call[1:3] for call in swarm.client.calls} == {("q", (B,))}
    assert await swarm.averager.exchange_once({TRUNK}) is None


async def test_the_block_that_met_the_partner_longest_ago_comes_first(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A, B)
    swarm.now_s += 1
    swarm.averager.on_result(result("p", A, dialled=False))
    await swarm.averager.exchange_once()
    assert swarm.client.calls[0][2] == (B, A)


async def test_what_others_began_is_counted_and_told_too(swarm: Swarm) -> None:
    swarm.averager.on_result(result("p", A, dialled=False, n_bytes=50))
    swarm.averager.on_result(result("p", dialled=False, n_bytes=7, problem="went away"))
    assert swarm.averager.divergence(A) == 0.25
    assert swarm.averager.exchanged_bytes == 57
    assert [(event["dialled"], event["problem"]) for event in swarm.events] == [(False, ""), (False, "went away")]


async def test_a_block_that_is_no_longer_here_has_no_divergence(swarm: Swarm) -> None:
    swarm.averager.on_result(result("p", A, B))
    del swarm.replicas.held[A]
    swarm.averager.on_result(result("p", B))
    assert (swarm.averager.divergence(A), swarm.averager.divergence(B)) == (0.0, 0.25)


@pytest.mark.parametrize("as_result", [True, False], ids=["told", "raised"])
async def test_a_failing_partner_is_an_event_and_left_alone_for_longer_each_time(
    swarm: Swarm, *, as_result: bool
) -> None:
    swarm.directory.listed += holder("p", A)
    error: ExchangeResult | Exception = result("p", problem="gone") if as_result else UnavailableError("gone")
    for n in range(3):
        swarm.client.script.append(error)
        failed = await swarm.averager.exchange_once()
        assert failed is not None
        assert (failed.problem, failed.blocks) == ("gone", ())
        swarm.now_s += FIRST_AVOID_S * 2**n - 0.01
        assert await swarm.averager.exchange_once() is None
        swarm.now_s += 0.01
    assert [event["problem"] for event in swarm.events] == ["gone"] * 3
    answered = await swarm.averager.exchange_once()
    assert answered is not None
    assert not answered.problem
    assert await swarm.averager.exchange_once() is not None


async def test_who_could_not_be_reached_is_named_until_it_answers(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A)
    swarm.client.script += [DeadlineError("silent"), UnavailableError("connection refused")]
    await swarm.averager.exchange_once()
    assert swarm.averager.unreachable() == frozenset(), "slow is not gone"
    swarm.now_s += FIRST_AVOID_S
    await swarm.averager.exchange_once()
    assert swarm.averager.unreachable() == {"p"}
    swarm.now_s += 2 * FIRST_AVOID_S
    await swarm.averager.exchange_once()
    assert len(swarm.client.calls) == 3
    assert swarm.averager.unreachable() == frozenset()


async def test_others_are_dialled_while_one_is_left_alone(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A)
    swarm.client.script.append(UnavailableError("gone"))
    await swarm.averager.exchange_once()
    swarm.directory.listed += holder("q", A)
    for _ in range(3):
        await swarm.averager.exchange_once()
    assert [call[1] for call in swarm.client.calls] == ["p", "q", "q", "q"]


BUSY = result("p", refused={A: BUSY_THERE}, busy=frozenset({A}))


@pytest.mark.parametrize("answer", [OverloadedError("in another exchange", FIRST_BUSY_S), BUSY], ids=["call", "block"])
async def test_a_busy_partner_is_tried_again_soon_and_has_not_been_met(
    swarm: Swarm, answer: ExchangeResult | Exception
) -> None:
    swarm.directory.listed += holder("p", A)
    swarm.now_s += 50.0
    swarm.client.script.append(answer)
    assert await swarm.averager.exchange_once() is not None
    assert await swarm.averager.exchange_once() is None
    swarm.now_s += FIRST_BUSY_S * (1 + BUSY_JITTER)
    assert swarm.averager._history.seconds_since(A, "p", swarm.now_s) > 50.0
    assert await swarm.averager.exchange_once() is not None
    assert len(swarm.client.calls) == 2


async def test_those_who_wait_for_the_same_partner_do_not_come_back_together() -> None:
    waits_s = set()
    for peer_id in ("own", "other"):
        swarm = Swarm(peer_id=peer_id)
        swarm.directory.listed += holder("p", A)
        swarm.client.script.append(OverloadedError("in another exchange", 0.2))
        await swarm.averager.exchange_once()
        waits_s.add(swarm.averager._history.busy_for_s(swarm.now_s))
    assert len(waits_s) == 2
    assert 0.2 <= min(waits_s) < max(waits_s) <= 0.2 * (1 + BUSY_JITTER)


async def test_a_turn_that_a_busy_partner_cost_is_made_up_for_before_the_next_period() -> None:
    swarm = Swarm(period_s=10_000.0)
    swarm.directory.listed += holder("p", A)
    swarm.averager._history.busy("p", swarm.now_s, 1.0)
    assert swarm.averager._wait_s(0.0, None) == 1.0
    assert swarm.averager._wait_s(0.0, BUSY) == 1.0
    assert swarm.averager._wait_s(0.0, result("q", A)) > 5_000.0


async def test_nothing_is_exchanged_again_before_there_is_news(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A)
    swarm.averager.on_result(result("p", A, dialled=False))
    together = replace(result("p", A).blocks[0], divergence=0.0)
    swarm.averager.on_result(replace(result("p"), blocks=(together,)))
    assert await swarm.averager.exchange_once() is None
    swarm.replicas.held[A].version += 1
    assert await swarm.averager.exchange_once() is not None


async def test_an_exchange_that_ended_early_but_moved_something_is_no_failure(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A, B)
    swarm.now_s += 1
    swarm.client.script.append(result("p", A, problem="too late"))
    assert await swarm.averager.exchange_once() is not None
    assert await swarm.averager.exchange_once() is not None
    assert [call[2] for call in swarm.client.calls] == [(A, B), (B, A)]
    assert [event["problem"] for event in swarm.events] == ["too late", ""]


async def test_a_partner_that_always_refuses_does_not_keep_others_waiting(swarm: Swarm) -> None:
    swarm.directory.listed += [*holder("p", A), *holder("refuser", A)]
    swarm.client.refuser = "refuser"
    for _ in range(60):
        swarm.now_s += 2.0
        assert await swarm.averager.exchange_once() is not None
    refused = sum(event["refused"] for event in swarm.events)
    assert 15 < refused < 45
    assert sum(event["blocks"] for event in swarm.events) == 60 - refused


async def test_exchanges_of_one_node_never_overlap(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A)
    swarm.client.gate.clear()
    both = asyncio.gather(swarm.averager.exchange_once(), swarm.averager.exchange_once())
    await swarm.client.wait_for_calls(1)
    swarm.client.gate.set()
    assert all(await both)
    assert len(swarm.client.calls) == 2


async def test_it_goes_on_by_itself_until_it_is_stopped(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A)
    swarm.tick_s = 0.1
    swarm.averager.start()
    swarm.averager.start()
    await swarm.client.wait_for_calls(5)
    await swarm.averager.stop()
    n_calls = len(swarm.client.calls)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(swarm.client.calls) == n_calls
    await swarm.averager.stop()


async def test_neither_a_failing_partner_nor_a_mistake_ends_the_loop(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
) -> None:
    swarm.directory.listed += [*holder("p", A), *holder("q", A)]
    swarm.client.script += [UnavailableError("gone"), RuntimeError("a mistake")]
    swarm.tick_s = 0.1
    swarm.averager.start()
    await swarm.client.wait_for_calls(4)
    await swarm.averager.stop()
    assert swarm.events[0]["problem"] == "gone"
    assert swarm.events[1]["problem"] == ""
    assert "a mistake" in caplog.text


async def test_stopping_in_the_middle_cancels_the_exchange(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A)
    swarm.client.gate.clear()
    swarm.averager.start()
    await swarm.client.wait_for_calls(1)
    await swarm.averager.stop()
    assert swarm.client.cancelled == 1
    assert swarm.events == []


async def test_an_exchange_that_will_not_end_is_left_behind(
    swarm: Swarm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.averaging.averager.STOP_TIMEOUT_S", 0.01)
    swarm.directory.listed += holder("p", A)
    release, ended = asyncio.Event(), asyncio.Event()

    async def end() -> None:
        await release.wait()
        ended.set()

    swarm.client.end = end  # type: ignore[method-assign]
    swarm.client.gate.clear()
    swarm.averager.start()
    await swarm.client.wait_for_calls(1)
    await swarm.averager.stop()
    assert not ended.is_set()
    assert "does not end" in caplog.text
    release.set()
    await ended.wait()


async def test_stopping_without_a_start_does_nothing_and_a_start_still_works_then(swarm: Swarm) -> None:
    swarm.directory.listed += holder("p", A)
    await swarm.averager.stop()
    assert swarm.client.calls == []
    swarm.averager.start()
    await swarm.client.wait_for_calls(1)
    await swarm.averager.stop()


def test_exchanges_begin_about_a_period_apart_however_long_they_take() -> None:
    rng = random.Random(1)
    pauses_s = [pause_s(2.0, 0.5, rng) for _ in range(200)]
    assert 2.0 * (1 - JITTER) - 0.5 <= min(pauses_s) < 1.1
    assert 1.9 < max(pauses_s) <= 2.0 * (1 + JITTER) - 0.5
    assert pause_s(2.0, 100.0, rng) == 0.0


async def test_nodes_that_share_a_seed_do_not_choose_in_step(swarm: Swarm) -> None:
    log = EventLog()
    first, other, again = (
        Averager(
            swarm.replicas,
            swarm.client,
            swarm.directory,
            AveragerConfig(peer_id=peer_id, period_s=1.0, seed=3),
            log,
        )
        for peer_id in ("p", "q", "p")
    )
    pauses_s = [[pause_s(1.0, 0.0, averager._rng) for _ in range(5)] for averager in (first, other, again)]
    assert pauses_s[0] != pauses_s[1]
    assert pauses_s[0] == pauses_s[2]


async def test_what_partners_learn_is_told_relative_to_this_replica_and_nobody_learns_infinitely_more(
    swarm: Swarm,
) -> None:
    assert swarm.averager.works(A, 0) == (1.0,)
    for partner, share in (("idle", 0.0), ("alike", 0.5), ("busy", 0.75), ("boaster", 1.0)):
        (moved,) = result(partner, A).blocks
        swarm.averager.on_result(result(partner, blocks=(replace(moved, partner_share=share),)))
    own, *others = swarm.averager.works(A, 0)
    assert own == 1.0
    assert others == pytest.approx([0.0, 1.0, 3.0, MAX_SHARE / (1 - MAX_SHARE)])
    assert swarm.averager.works(B, 0) == (1.0,)


async def test_a_block_that_is_too_slow_here_is_told_once_and_not_tried_again(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
) -> None:
    swarm.directory.listed += holder("p", A, B)
    swarm.client.script.append(result("p", B, refused={A: SLOW_HERE}))
    await swarm.averager.exchange_once()
    swarm.now_s += 1000.0
    await swarm.averager.exchange_once()
    assert [blocks for _, _, blocks, _ in swarm.client.calls] == [(A, B), (B,)]
    (told,) = caplog.messages
    assert told.startswith("Block 0/0 is not averaged here: at the rate that --max-bandwidth-up")

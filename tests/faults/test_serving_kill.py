"""Hosts are killed and replaced under a server: no stream is cut, and each says what an undisturbed model says.

Weights and messages are float64, so that no sum rounds to another token, whoever else is served; and nothing trains, so
that all replicas of a block are alike. Every host holds every block: when one is killed, two live replicas are left.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

import openai
import pytest
import torch

from common.tokenizer import ByteTokenizer
from node.data import open_dataset
from node.membership.config import SwarmConfig
from node.model.moe import LocalExperts
from node.model.next_token import GenerationConfig
from node.trainer.sampling import sample_text
from node.trainer.swarm_client import SwarmClient
from node.trainer.train_step import StepConfig, Training, build_transformer
from node.trainer.trunk_state import TrainingProgress, save_trunk
from tests.support.churn import Churn, ChurnConfig
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from common.errors import TooFewExpertsError
    from experiments.live.processes import Node, ProcessSwarm
    from node.model.transformer import Transformer
    from protocol.manifest import Manifest

MANIFEST = small_manifest(
    dtype="fp64",
    codec="fp64",
    model={"gate": "hash", "gate_reads": "tokens", "gate_score": "softmax", "smear": 2, "context": 64},
)
ALL_BLOCKS = ("--blocks", "0/0-3,1/0-3")
N_HOSTS = 3
PROMPTS = ("The ", "City", "42", "Of hosts and ")
GREEDY = GenerationConfig(max_new_tokens=100, temperature=0.0)
PATIENCE_S = 60.0
LONGEST_GAP_S = 10.0
"""Half of a call's deadline, which is what a host that falls silent costs; one that is dead is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server over hosts that are all up, and what the same model says of each prompt in one process."""

    churn: Churn
    answers: Answers
    server: Node
    url: str
    name: str
    expected: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stream that was read to its end; `slowest_s` is the longest time without a token."""

    prompt: str
    text: str
    finish: str | None
    n_tokens: int
    slowest_s: float


class Answers:
    """Which hosts have answered for any text so far, and which one for most of the latest step."""

    def __init__(self) -> None:
        self.peers: set[str] = set()
        self._busiest = ""

    def add(self, pairs_by_peer: Mapping[str, int]) -> None:
        self.peers |= pairs_by_peer.keys()
        self._busiest = max(pairs_by_peer, key=pairs_by_peer.__getitem__)

    def busiest(self, _: random.Random, hosts: Sequence[Node]) -> Node:
        """Whose death is felt at once: who costs more than others is left alone for a while."""
        return next((host for host in hosts if peer_id_of(host) == self._busiest), hosts[0])


def peer_id_of(host: Node) -> str:
    return str(host.wait_for("announced")["peer_id"])


@pytest.fixture
def served(swarm: ProcessSwarm, text: Path) -> Iterator[Served]:
    answers = Answers()
    with SwarmClient(SwarmConfig(swarm=swarm.swarm_file)) as client:
        churn = Churn(swarm, client, ALL_BLOCKS, answers.busiest)
        for _ in range(N_HOSTS):
            churn.start_host()
        expected = texts_of_saved_trunk(client.manifest, text, swarm.folder / "trunk")
        server = swarm.server("server", swarm.folder / "trunk")
        for host in churn.hosts:
            host.wait_for("announced")
        url = server.wait_for_url()
        yield Served(
            churn=churn, answers=answers, server=server, url=url, name=client.manifest.run_id, expected=expected
        )


def texts_of_saved_trunk(manifest: Manifest, text: Path, folder: Path) -> dict[str, str]:
    """Save a trunk as a trainer does; what it writes over experts in this process, by prompt."""
    experts = LocalExperts(manifest)
    model = build_transformer(manifest, experts, torch.Generator().manual_seed(manifest.seed))
    dataset = open_dataset(text, cache_dir=folder / "data")
    training = Training(manifest, model, experts, dataset, StepConfig(batch=1, micro_batches=1), give_up)
    try:
        save_trunk(folder, training, TrainingProgress())
    finally:
        training.close()
    return {prompt: written_after(prompt, model.eval()) for prompt in PROMPTS}


def written_after(prompt: str, model: Transformer) -> str:
    whole = sample_text(model, ByteTokenizer(), prompt.encode(), GREEDY, lambda step, generation: step(generation))
    return whole.removeprefix(prompt)


def give_up(error: TooFewExpertsError) -> NoReturn:
    raise error


class Readers:
    """A client for each prompt, each of which reads one stream after the other until `stop` is set."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._changed = asyncio.Condition()
        self.stop = asyncio.Event()
        self.streams: list[Stream] = []

    async def read(self, prompt: str) -> None:
        url = f"{self._served.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            while not self.stop.is_set():
                self.streams.append(await self._stream(client, prompt))

    async def until_answered_by(self, host: Node) -> None:
        """Return once experts of this host had a part in a text."""
        peer_id = peer_id_of(host)
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(lambda: peer_id in self._served.answers.peers)

    async def _stream(self, client: openai.AsyncOpenAI, prompt: str) -> Stream:
        stream = await client.completions.create(
            model=self._served.name,
            prompt=prompt,
            max_tokens=GREEDY.max_new_tokens,
            temperature=0,
            stream=True,
            extra_body={"kilohive": True},
        )
        text, finish, arrived_s = "", None, [time.monotonic()]
        async for chunk in stream:
            arrived_s.append(time.monotonic())
            for choice in chunk.choices:
                text, finish = text + choice.text, choice.finish_reason
            async with self._changed:
                self._served.answers.add(chunk.kilohive["peers"])  # type: ignore[attr-defined]
                self._changed.notify_all()
        slowest_s = max(later - sooner for sooner, later in pairwise(arrived_s))
        return Stream(prompt=prompt, text=text, finish=finish, n_tokens=len(arrived_s) - 1, slowest_s=slowest_s)


async def streams_while_hosts_die(served: Served, config: ChurnConfig) -> list[Stream]:
    """What four clients read meanwhile: from before the first kill until the last joiner has answered too."""
    readers, churn = Readers(served), served.churn
    async with asyncio.TaskGroup() as reading:
        for prompt in PROMPTS:
            reading.create_task(readers.read(prompt))
        for host in churn.hosts:
            await readers.until_answered_by(host)
        await asyncio.to_thread(churn.run, config, [served.server])
        await readers.until_answered_by(churn.hosts[-1])
        readers.stop.set()
    return readers.streams


def check(served: Served, streams: list[Stream], config: ChurnConfig) -> None:
    log = (served.server.folder / "log.txt").read_text()
    slowest_s = max(stream.slowest_s for stream in streams)
    print(
        f"{len(streams)} streams, {len(served.churn.killed)} kills at {served.churn.kill_times_s} s, "
        f"{log.count(' failed: ')} calls failed, slowest token after {slowest_s:.2f} s"
    )
    assert len(served.churn.killed) == config.kills
    assert min(min(look.replicas.values()) for look in served.churn.checks) >= N_HOSTS - 1
    for stream in streams:
        assert (stream.finish, stream.n_tokens) == ("length", GREEDY.max_new_tokens)
        assert stream.text == served.expected[stream.prompt]
    assert {stream.prompt for stream in streams} == set(PROMPTS)
    assert slowest_s < LONGEST_GAP_S
    for victim in served.churn.killed:
        assert f"Peer {peer_id_of(victim)} at" in log, "its death was felt in mid-text"
    assert "Traceback" not in log


async def test_a_host_killed_under_four_streams_cuts_none_and_its_successor_answers_too(served: Served) -> None:
    config = ChurnConfig(kills=1, period_s=1.0, check_s=0.5)
    check(served, await streams_while_hosts_die(served, config), config)


@pytest.mark.slow  # three minutes
@pytest.mark.timeout(600)
async def test_a_host_killed_and_another_started_every_20_s_for_three_minutes_cut_no_stream(served: Served) -> None:
    config = ChurnConfig(kills=9, seed=1)
    check(served, await streams_while_hosts_die(served, config), config)

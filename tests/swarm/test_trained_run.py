"""`status`, `evaluate`, `sample`, `serve` and `credit` on a swarm that is up and a trunk that was trained."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import openai
import pytest

from common.text import printable
from experiments.live.processes import RUN_NODE, ProcessSwarm, process_swarm, wait_until
from protocol.swarm_file import SwarmFile
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"Line {n} of the log says {n % 9}."}) + "\n" for n in range(2000)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Iterator[ProcessSwarm]:
    manifest = small_manifest(optimizer={"lr": 1e-2, "expert_lr": 1e-2, "total_tokens": 10_000})
    with process_swarm(tmp_path_factory.mktemp("swarm"), manifest) as swarm:
        for name, blocks in (("host-0", "0/0-3,1/0"), ("host-1", "1/1-3")):
            swarm.host(name, blocks).wait_for("announced")
        trainer = swarm.trainer("trainer", "--data", str(text), "--steps", "40", "--eval-every", "0")
        trainer.wait_for("done")
        wait_until(trainer.child.ended, "the trainer left")
        yield swarm


def run(swarm: ProcessSwarm, *arguments: str) -> str:
    command = [sys.executable, RUN_NODE, *arguments, "--join", str(swarm.swarm_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_evaluate_prints_the_bits_per_byte_that_training_ended_with(trained: ProcessSwarm, text: Path) -> None:
    done = next(node for node in trained.nodes if node.folder.name == "trainer").events("done")[-1]
    out = trained.folder / "trainer"
    printed = run(trained, "evaluate", "--out", str(out), "--data", str(text), "--n-bytes", str(4 * 16_384))
    assert float(printed.split()[0]) == pytest.approx(done["bits_per_byte_end"], abs=0.02)
    assert "step 40" in printed


def test_sample_continues_the_prompt_and_repeats_with_the_seed(trained: ProcessSwarm) -> None:
    arguments = ("sample", "--out", str(trained.folder / "trainer"), "--prompt", "Line ", "--n-tokens", "40")
    first, other = run(trained, *arguments), run(trained, *arguments, "--seed", "1")
    assert first.startswith("Line ")
    assert other != first
    assert run(trained, *arguments, "--n", "2") == f"[1 of 2]\n{first}[2 of 2]\n{other}"


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    command, pipe = [sys.executable, RUN_NODE, *arguments], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def test_serve_answers_with_what_sample_writes_and_ends_within_three_seconds(trained: ProcessSwarm) -> None:
    out = str(trained.folder / "trainer")
    sampled = run(trained, "sample", "--out", out, "--prompt", "Line ", "--n-tokens", "40", "--seed", "3")
    arguments = ("serve", "--out", out, "--port", "0", "--join", str(trained.swarm_file))
    with serving(arguments) as server:
        assert server.stdout is not None
        said = [server.stdout.readline() for _ in range(5)]
        url = said[0].split()[-1]
        assert said[0] == f"{SwarmFile.read(trained.swarm_file).run_id} is served at {url}\n"
        assert f"curl {url}v1/completions" in said[-1]
        with openai.OpenAI(base_url=f"{url}v1", api_key="none", timeout=TIMEOUT_S) as client:
            (model,) = client.models.list()
            asked: dict[str, Any] = {"model": model.id, "prompt": "Line ", "temperature": 0.8, "seed": 3}
            written = client.completions.create(**asked, max_tokens=40).choices[0].text
            stream = client.completions.create(**asked, max_tokens=4000, stream=True)
            next(stream)
            server.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIError, match="stopping"):
                list(stream)
        _, stderr = server.communicate(timeout=3)
    assert server.returncode == 0, stderr
    assert "Line " not in stderr
    assert "Traceback" not in stderr
    assert printable(f"Line {written}") == sampled.removesuffix("\n")


def test_status_shows_peers_and_blocks_from_the_dht_alone(trained: ProcessSwarm) -> None:
    printed = run(trained, "status")
    for word in ("host", "coordinator", "127.0.0.1:"):
        assert word in printed
    answer = trained.status()
    assert answer["blocks_lost"] == []


def test_credit_shows_what_hosts_and_the_trainer_have_earned_once_it_is_there_again(
    trained: ProcessSwarm, text: Path, tmp_path: Path
) -> None:
    """Last: the trainer goes on from its trunk."""
    arguments = ("credit", "--out", str(tmp_path), "--csv", str(tmp_path / "sums.csv"), "--json", str(tmp_path / "j"))
    printed = run(trained, *arguments)
    assert "nobody has earned anything yet" in printed
    assert "receipts are of peers that were not seen in the run" in printed
    more = ("--data", str(text), "--steps", "1000000", "--eval-every", "0", "--resume", "--set", "team=Engines")
    trainer = trained.trainer("trainer", *more)
    trainer.wait_for("step", count=41)
    printed = run(trained, *arguments)
    assert trainer.stop() == 130
    sums = json.loads((tmp_path / "j").read_text())
    (earned,) = sums["trainers"]
    tokens = 40 * 8 * 2 * 16
    # A pair that a step left out, as over an expert's capacity, teaches nothing and earns nothing.
    assert 0.8 * tokens < earned["tokens_learnt"] <= earned["own_tokens"]
    assert (earned["team"], sums["unseen_receipts"]) == ("Engines", 0)
    backward = sum(host["backward_pairs"] for host in sums["hosts"])
    assert backward // (2 * 2) == earned["tokens_learnt"]
    assert len(sums["hosts"]) == 2
    assert all(host["forward_pairs"] >= host["backward_pairs"] > 0 for host in sums["hosts"])
    assert (tmp_path / "sums.csv").read_text().count("\n") == 1 + 2 + 1
    assert f"{earned['tokens_learnt']:,}" in printed

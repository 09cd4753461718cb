"""`run_node.py local` as a user runs it: to the end, interrupted, resumed, mistyped. Real nodes, real training."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from experiments.live.processes import RUN_NODE, events, wait_until

if TYPE_CHECKING:
    from pathlib import Path

SUMMARY_FIELDS = {
    "experts",
    "hosts",
    "trainers",
    "steps",
    "tokens",
    "bits_per_byte_start",
    "bits_per_byte_end",
    "tokens_per_s",
    "calls_failed",
    "wall_s",
}
SMALL = (
    "--hosts", "2", "--experts", "32", "--experts-per-block", "4", "--d-model", "32", "--heads", "2", "--context", "32",
    "--expert-hidden", "16", "--batch", "4", "--set", "warmup_tokens=500", "--eval-every", "20", "--plain",
)  # fmt: skip
TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join(f"Row {n}: the square of {n % 50} is {(n % 50) ** 2}." for n in range(3000)))
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, RUN_NODE, *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def summary(out: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return table


def test_a_local_swarm_trains_to_the_end_and_leaves_its_files(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    done = run("local", *SMALL, "--steps", "60", "--out", str(out), "--data", str(text), "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "loss.png" in done.stdout
    result = summary(out)
    assert set(result) >= SUMMARY_FIELDS
    assert (result["experts"], result["hosts"], result["trainers"], result["steps"]) == (32, 2, 1, 60)
    assert result["tokens"] == 60 * 2 * 4 * 32
    assert result["bits_per_byte_end"] < result["bits_per_byte_start"] - 1
    assert result["calls_failed"] == 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    for what in ("held-out", "experts alive", "calls failed", "tokens/s", "sample"):
        assert what in done.stdout, what


@pytest.mark.slow  # what `local` adds to tests of averaging, a minute on a slow machine
def test_two_replicas_of_each_block_and_two_trainers_make_one_run(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    shape = ("--replicas", "2", "--trainers", "2", "--set", "averaging_period_s=0.2", "--steps", "120")
    arguments = ("local", *SMALL, *shape, "--out", str(out), "--data", str(text))
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    hosts = [events(out / host / "events.jsonl", "announced")[-1]["versions"] for host in ("host-0", "host-1")]
    assert hosts[0].keys() == hosts[1].keys()
    assert len(hosts[0]) == 8
    for folder in (out / "host-0", out / "host-1", out, out / "trainer-1"):
        assert any(event["blocks"] for event in events(folder / "events.jsonl", "exchange")), folder.name
    trained = [len(events(folder / "events.jsonl", "step")) for folder in (out, out / "trainer-1")]
    assert min(trained) > 0
    assert sum(trained) >= 120
    assert (out / "trainer-1" / "summary.json").exists()
    assert summary(out)["trainers"] == 2
    assert summary(out)["bits_per_byte_end"] < summary(out)["bits_per_byte_start"] - 1
    ended = events(out / "local.jsonl", "end")[-1]
    assert (ended["dead"], ended["killed"]) == ({}, [])
    again = run(*arguments, "--resume")  # nothing is left to train: every node goes on from its own folder, and ends
    assert again.returncode == 0, again.stdout + again.stderr


def test_ctrl_c_ends_everything_within_three_seconds_and_resume_goes_on(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    arguments = ("local", *SMALL, "--steps", "60", "--out", str(out), "--data", str(text))
    with subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(events(out / "events.jsonl", "step")) >= 15, "15 steps")
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert time.monotonic() - pressed < 3.0
    stopped_at = events(out / "events.jsonl", "stopped")[-1]["step"]
    assert stopped_at >= 15
    again = run(*arguments, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    steps = [event["step"] for event in events(out / "events.jsonl", "step")]
    assert steps == list(range(1, stopped_at + 1)) + list(range(stopped_at + 1, 61))
    for host in ("host-0", "host-1"):
        announced = events(out / host / "events.jsonl", "announced")
        assert sum(announced[0]["versions"].values()) == 0
        assert sum(announced[-1]["versions"].values()) > 0
    assert summary(out)["steps"] == 60


def test_without_resume_a_finished_run_is_not_overwritten(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "manifest.toml").write_text("")
    refused = run("local", *SMALL, "--steps", "5", "--out", str(out), "--data", str(text))
    assert refused.returncode == 2
    assert "--resume" in refused.stderr


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [("--data", "/nowhere/text.txt", "/nowhere/text.txt"), ("--device", "quantum", "--device: 'quantum'")],
)
def test_a_mistake_is_one_sentence_and_no_process_stays(tmp_path: Path, flag: str, value: str, sentence: str) -> None:
    failed = run("local", *SMALL, "--steps", "5", "--out", str(tmp_path / "run"), flag, value)
    assert failed.returncode != 0
    assert sentence in (failed.stdout + failed.stderr).replace("\n", " ")
    assert "Traceback" not in failed.stdout + failed.stderr

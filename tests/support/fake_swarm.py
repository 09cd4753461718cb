"""Stands in for run_node.py under the supervisor of a local swarm: same subcommands, no DHT, no torch, quick.

What each child does comes from the environment, KILOHIVE_FAKE: JSON of {child: behaviour}, where a child is
"coordinator", "host-0", ..., "trainer", "trainer-1", ... and its behaviour is one of

    wait            (default) until SIGTERM or the end of standard input
    exit N          at once with exit code N, after a line in its log
    stubborn        ignore SIGTERM and the end of standard input, with a grandchild in a session of its own
    begin exit N    a trainer: write the `start` event, then exit with N when the file `go` is there
    begin wait      a trainer: write the `start` event, then wait
    later exit N    exit with N when the file `later` is there
    slowly N        a coordinator: write a line to its log N times, 0.1 s apart, before it opens the run
    silent          a coordinator: say nothing, and never open the run
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from protocol.manifest import AveragingConfig, Manifest, ModelConfig, OptimizerConfig
from protocol.node_events import TrainingStartEvent
from protocol.swarm_file import SwarmFile

PEER = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWBmwkXtQAy2bqbBrAA6XzaGhB8Vu6rSYqZ3yQ3Vdp8Zfn"
POLL_S = 0.01
STARTED = TrainingStartEvent(
    run_id="fake",
    experts=8,
    hosts=1,
    step=0,
    steps=1,
    tokens_total=1,
    parameters_trunk=1,
    parameters_experts=1,
    documents=1,
    bytes_train=1,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--total-tokens", type=int, default=1)
    arguments, _ = parser.parse_known_args()
    name, out = place(arguments)
    behaviour = json.loads(os.environ.get("KILOHIVE_FAKE", "{}")).get(name, "wait")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        grandchild = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True)
        note(out, f"{name}-grandchild", grandchild.pid)
    note(out, name, os.getpid())
    if behaviour.startswith("slowly"):
        speak(int(behaviour.split()[1]))
    if behaviour == "silent":
        wait(stubborn=False)
    if name == "coordinator" and not behaviour.startswith("exit"):
        SwarmFile(run_id=opened_run(arguments).run_id, initial_peers=(PEER,)).write(out / "swarm.toml")
    (out / f"{name}.argv").write_text(json.dumps(sys.argv[1:]), encoding="utf-8")
    print(f"{name} says something before it ends", flush=True)
    if behaviour.startswith("begin"):
        with (arguments.out / "events.jsonl").open("a", encoding="utf-8") as events:
            events.write(json.dumps({"t": 0, **STARTED.to_row()}) + "\n")
        behaviour = behaviour.removeprefix("begin ")
        wait_for(out / "go", behaviour)
    if behaviour.startswith("later"):
        behaviour = behaviour.removeprefix("later ")
        wait_for(out / "later", behaviour)
    if behaviour.startswith("exit"):
        os._exit(int(behaviour.split()[1]))
    wait(stubborn=behaviour == "stubborn")


def opened_run(arguments: argparse.Namespace) -> Manifest:
    """The run in the folder, or a new one that is written there."""
    path = arguments.out / "manifest.toml"
    if path.exists():
        return Manifest.from_toml(path.read_text(encoding="utf-8"))
    manifest = Manifest(
        name="fake",
        owner="",
        model=ModelConfig(experts_per_layer=8, experts_per_block=2),
        optimizer=OptimizerConfig(total_tokens=arguments.total_tokens),
        averaging=AveragingConfig(target_replicas=arguments.replicas),
    )
    path.write_text(manifest.to_toml(), encoding="utf-8")
    return manifest


def place(arguments: argparse.Namespace) -> tuple[str, Path]:
    """The child's name, and the folder of the whole swarm."""
    if arguments.command == "host":
        return arguments.state.name, arguments.state.parent
    if arguments.command == "train" and arguments.out.name.startswith("trainer-"):
        return arguments.out.name, arguments.out.parent
    return arguments.command.replace("train", "trainer"), arguments.out


def speak(times: int) -> None:
    """Write lines as a program that is slow writes them to its log."""
    for number in range(times):
        print(f"2026-12-01 10:00:00,000 INFO common.progress: {number} GB of {times} GB read", flush=True)
        time.sleep(0.1)


def wait_for(file: Path, behaviour: str) -> None:
    while behaviour.startswith("exit") and not file.exists():
        time.sleep(POLL_S)


def note(out: Path, name: str, pid: int) -> None:
    """A line per process, so that a test knows whom to look for."""
    with (out / "pids").open("a", encoding="utf-8") as file:
        file.write(f"{name} {pid}\n")


def wait(*, stubborn: bool) -> None:
    while stubborn:
        time.sleep(1)
    while os.read(0, 1024):  # SIGTERM ends this process by default
        pass


if __name__ == "__main__":
    main()

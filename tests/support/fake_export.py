"""Stands in for run_node.py under a coordinator's snapshots: `export` without a swarm, quick.

The first argument is a file that says what it does:

    whole            write the folder, as `export` does: its name comes last
    fail SENTENCE    leave an unfinished folder, say the sentence as an error, end with exit code 1
    silent           the same without a word
    wait             leave an unfinished folder, wait until SIGTERM or the end of standard input
    stubborn         the same, whatever it is asked
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from common.folders import FolderClaim, claimed


def main() -> None:
    plan, command, *flags = sys.argv[1:]
    assert (command, flags[0], flags[2:4:2], flags[4:]) == ("export", "--join", ["--out"], ["--stop-on-stdin-eof"])
    out = Path(flags[3])
    word, _, sentence = Path(plan).read_text(encoding="utf-8").partition(" ")
    claim = FolderClaim(folder=out.parent, file=out.name, lock=f".{out.name}.lock", role="export", flag="--out")
    with claimed(claim):
        export(out, word, sentence)


def export(out: Path, word: str, sentence: str) -> None:
    if word == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    partial = out.with_name(f"{out.name}.partial")
    (partial / "model").mkdir(parents=True)
    (partial / "state.json").write_text("{}", encoding="utf-8")
    print(f"an export to {out}", flush=True)
    while word == "stubborn":
        time.sleep(1)
    while word == "wait" and os.read(0, 1024):  # SIGTERM ends this process by default
        pass
    if word == "whole":
        (partial / "model" / "SHA256SUMS").write_text("of nothing\n", encoding="utf-8")
        (partial / "model").rename(out)
        shutil.rmtree(partial)
        return
    if word == "fail":
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()

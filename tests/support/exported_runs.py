"""A real run that is trained and stands still, and what its model says wherever it is read."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.assets import asset_store
from experiments.live.processes import RUN_NODE
from node.model.generation import Generation, Prompt
from node.model.next_token import GenerationConfig
from tests.support.contributing import RunInLoop, run_in_loop
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from node.model.trunk import Trunk
    from protocol.manifest import Manifest

CLOSE: Any = {"atol": 1e-4, "rtol": 0.0}
# It learns fast for a few steps; after them the rate is 0, and the run stands still although its trainer is there.
RATES = {"total_tokens": 10_000, "final_lr_fraction": 0.0, "lr": 1e-2, "expert_lr": 1e-2}

STRANGER = """
import importlib.util, json, sys, torch
assert not any(importlib.util.find_spec(name) for name in ("kilohive", "node", "common", "protocol")), sys.path
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.load(f"{out}/ids.pt", weights_only=True)
with torch.no_grad():
    torch.save(model(ids).logits, f"{out}/logits.pt")
read = tokenizer(prompt, return_tensors="pt")
written = model.generate(**read, do_sample=False, max_new_tokens=8, eos_token_id=None)
told = {"read": read["input_ids"].tolist(), "text": tokenizer.decode(written[0])}
if tokenizer.chat_template:
    messages = [{"role": "user", "content": "Hello"}]
    told["chat"] = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
model.save_pretrained(f"{out}/again")
again = AutoModelForCausalLM.from_pretrained(f"{out}/again", trust_remote_code=True)
types = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()}
assert types == {name: str(p.dtype).removeprefix("torch.") for name, p in again.named_parameters()}
with torch.no_grad():
    assert torch.equal(again(ids).logits, model(ids).logits)
print(json.dumps({**told, "types": types}))
"""


@asynccontextmanager
async def trained_run(folder: Path, manifest: Manifest, text: Path, n_hosts: int) -> AsyncIterator[RunInLoop]:
    """A run whose trainer has trained to the last token, saved its trunk and left; its hosts are up."""
    asset_store().add(tiny_tokenizer())
    async with run_in_loop(folder, manifest, text, n_hosts) as run:
        await run.until((run.trainer_folder / "summary.json").exists)
        await run.until(run.trainer.done)
        yield run


@dataclass(frozen=True)
class Greedy:
    """What a model says: logits of some ids, and the ids that it goes on with."""

    logits_BTV: torch.Tensor
    written: list[int]


@torch.no_grad()
def greedy(model: Trunk, ids: torch.Tensor, prompt: list[int]) -> Greedy:
    config = GenerationConfig(max_new_tokens=8, temperature=0)
    steps = Generation(model, [Prompt(ids=prompt, config=config)])
    return Greedy(model(ids), [new.token for step in steps for new in step])


async def read_by_a_stranger(folder: Path, out: Path, ids: torch.Tensor, prompt: str) -> tuple[torch.Tensor, Any]:
    """Logits and text of a process that knows nothing of Kilohive but the folder."""
    torch.save(ids, out / "ids.pt")
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", STRANGER, str(folder), str(out), prompt),
        cwd=out,
        env={**inherited, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules"), "HF_HOME": str(out / "hf")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, errors = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, errors.decode()
    return torch.load(out / "logits.pt", weights_only=True), json.loads(told)


async def killed_export(run: RunInLoop, out: Path) -> None:
    """One in a process of its own, which is killed as soon as some of the model has come."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, RUN_NODE, "export", "--join", str(run.swarm_file), "--out", str(out)),
        *("--trunk", str(run.trainer_folder)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    parts = out.with_name(f"{out.name}.partial") / "parts"
    await run.until(lambda: process.returncode is not None or any(parts.glob("[!.]*")))
    assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    await process.wait()

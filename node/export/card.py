"""The card of an exported model: what it is, where each part of it came from, and what is not known of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.vocabulary import BYTES
from node.trainer.exported.config_file import DTYPE_NAMES
from node.trainer.exported.layout import CODE
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from node.export.unfinished import Taken
    from protocol.manifest import BlockId, Manifest

MAX_NAMED = 10
MAX_SUMMARY_BYTES = 1 << 20
MAX_CHARS = 1000

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- kilohive
- mixture-of-experts
---
"""

USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, do_sample=True)[0]))
```

`trust_remote_code` runs {code} of this folder, which need torch and transformers and nothing else. In a checkout of
Kilohive `from kilohive import load_model` reads the folder without them. `sha256sum -c SHA256SUMS` says whether the
folder is whole.
"""

AROUND = """## The pretrained model

The run is called `{name}`, and knows the model that it is built around by these files:

| file | bytes | SHA-256 |
| --- | --- | --- |
{files}

Its weights are most of this folder, so that its licence applies here. The run does not know which licence that is: look
at where the model comes from.

Trained were the experts beside the feed-forward parts of its layers {layers}, counted from 0, and the gates that choose
among them{unfrozen}. All else of it is as it was, in {dtype}.

"""

WHAT = {
    "transformer": "A mixture-of-experts language model that a Kilohive swarm has trained",
    "hf": "A pretrained language model with experts beside it that a Kilohive swarm has trained",
}
"""What the card is of, by the model's trunk."""


@dataclass(frozen=True, kw_only=True)
class KnownTraining:
    """What is known of how a run was trained, as the trainer whose folder it is says; empty or None if nothing is."""

    data: str = ""
    held_out_bits: float | None = None
    steps: int = 0


def training_of(folder: Path | None, run_id: str) -> KnownTraining:
    """What the summary in a trainer's folder says of this run; nothing where there is none that does."""
    if folder is None:
        return KnownTraining()
    try:
        with (folder / "summary.json").open("rb") as file:
            told = json.loads(file.read(MAX_SUMMARY_BYTES))
        if told["run_id"] != run_id:
            return KnownTraining()
        data, bits, steps = str(told["attribution"]), float(told["bits_per_byte_end"]), int(told["steps"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return KnownTraining()
    return KnownTraining(data=" ".join(data.split())[:MAX_CHARS], held_out_bits=bits, steps=steps)


def card_text(
    manifest: Manifest, taken: Mapping[BlockId, Taken], newest: Mapping[BlockId, int], training: KnownTraining
) -> str:
    """The text; `newest` are the versions that live replicas announce at the end of the export."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(manifest, taken[TRUNK], training).items())
    trunk = manifest.model.trunk
    around = _around(manifest) if trunk == "hf" else ""
    use = USE.format(code=", ".join(f"`{name}`" for name in CODE[trunk]))
    return (
        f"{HEAD}\n# {manifest.run_id}\n\n{WHAT[trunk]}, as it was when it was exported.\n\n"
        f"| what | value |\n| --- | --- |\n{rows}\n\n{around}{use}\n"
        f"## Where it came from\n\n{_origin(taken)}\n\n{_moments(taken, newest)}\n"
    )


def _around(manifest: Manifest) -> str:
    """What the model is that the run was built around, and which part of the folder was trained."""
    pretrained = manifest.pretrained
    files = "\n".join(f"| `{file.name}` | {file.n_bytes:,} | `{file.sha256}` |" for file in pretrained.files)
    unfrozen = ", ".join(f"`{name}`" for name in pretrained.unfreeze)
    return AROUND.format(
        name=manifest.name,
        files=files,
        layers=", ".join(map(str, pretrained.attach)),
        unfrozen=f", and of its own parameters those whose names begin with {unfrozen}" if unfrozen else "",
        dtype=DTYPE_NAMES[pretrained.dtype],
    )


def _facts(manifest: Manifest, trunk: Taken, training: KnownTraining) -> dict[str, str]:
    model = manifest.model
    tokens = "bytes" if manifest.data.tokenizer == BYTES else f"{model.vocab_size:,} pieces of text (`tokenizer.json`)"
    held_out = "not known"
    if training.held_out_bits is not None:
        held_out = f"{training.held_out_bits:.4f} bits per byte at step {training.steps:,}, as its trainer measured"
    n_all, is_around = model.n_layers * model.experts_per_layer, model.trunk == "hf"
    return {
        "run": f"`{manifest.run_id}`",
        "trained on": f"{trunk.run_tokens:,} tokens",
        "held-out loss": held_out,
        "data": training.data or "not known to who exported it, nor is its licence",
        "layers with experts" if is_around else "layers": f"{model.n_layers}, of width {model.d_model}",
        "experts": f"{n_all:,} ({model.experts_per_layer:,} in each layer, kind "
        f"`{model.expert_kind}`, {model.d_model} to {model.expert_hidden}), {model.experts_per_token} for a token",
        "gate": f"`{model.gate}`",
        "context in training" if is_around else "context": f"{model.context:,} tokens",
        "a token is": "a byte" if tokens == "bytes" else f"one of {tokens}",
    }


def _origin(taken: Mapping[BlockId, Taken]) -> str:
    words, n_blocks = Counter(of.word for block_id, of in taken.items() if block_id != TRUNK), len(taken) - 1
    sentences = [f"The trunk was taken from {_with_word(taken[TRUNK])}, at version {taken[TRUNK].version:,}."]
    if agreed := words["two replicas"]:
        sentences.append(
            f"Of {n_blocks:,} blocks of experts {agreed:,} were taken from a replica that a second confirmed."
        )
    if alone := words["one replica"]:
        sentences.append(
            f"{alone:,} of {n_blocks:,} blocks were taken on the word of the only replica that could be had: nobody "
            "confirms them."
        )
    return " ".join(sentences)


def _with_word(taken: Taken) -> str:
    return {
        "two replicas": "a replica that a second confirmed",
        "one replica": "the only replica that could be had, on its word",
        "a checkpoint": "a trainer's checkpoint",
    }[taken.word]


def _moments(taken: Mapping[BlockId, Taken], newest: Mapping[BlockId, int]) -> str:
    """How far the run went on while it was exported: parts that were taken early are older than those taken late."""
    gone_on = {block_id: newest.get(block_id, 0) - of.version for block_id, of in taken.items()}
    moved = sorted((item for item in gone_on.items() if item[1] > 0), key=lambda item: (-item[1], item[0]))
    if not moved:
        return "Each part is of one moment, and none had learnt further when the export ended: the run stood still."
    named = ", ".join(f"{block_id} by {steps:,}" for block_id, steps in moved[:MAX_NAMED])
    rest = f" and {len(moved) - MAX_NAMED:,} more by less" if len(moved) > MAX_NAMED else ""
    return (
        f"Each part is of one moment, but not all of the same: the run went on meanwhile. At the end {len(moved):,} of "
        f"{len(taken):,} parts had live replicas that were further, in optimizer steps: {named}{rest}. The version of "
        "each part is in the metadata of `model.safetensors.index.json`."
    )

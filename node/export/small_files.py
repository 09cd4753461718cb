"""Everything in the folder of an exported model but its weights: the same bytes for the same model."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from node.export.tokenizer_files import tokenizer_files
from node.trainer import exported
from node.trainer.exported.config_file import config_text
from node.trainer.exported.layout import CARD, CODE, CONFIG, GENERATION, INDEX, n_bytes
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from node.export.pretrained_model import PretrainedParts
    from node.export.unfinished import Taken
    from node.trainer.exported.layout import FileGroup
    from protocol.manifest import BlockId, Manifest

STRIDES = "strides_X"
TEMPERATURE = 0.8
"""What `sample` draws with unless it is told otherwise."""


def small_files(
    manifest: Manifest,
    groups: Sequence[FileGroup],
    taken: Mapping[BlockId, Taken],
    card: str,
    tokenizer: bytes | None,
    pretrained: PretrainedParts | None = None,
) -> dict[str, bytes]:
    """The files by name; `tokenizer` is the run's own file, None where tokens are bytes."""
    of_files = [(name, tensor) for group in groups for name, tensors in group.files for tensor in tensors]
    n_strides = next((tensor.shape[0] for _, tensor in of_files if tensor.name.endswith(STRIDES)), 0)
    index = {
        "metadata": {
            "total_size": sum(n_bytes(tensor) for _, tensor in of_files),
            "run_id": manifest.run_id,
            "versions": {str(block_id): of.version for block_id, of in taken.items()},
        },
        "weight_map": {tensor.name: name for name, tensor in of_files},
    }
    library, tokens = (None, None) if pretrained is None else (pretrained.library, pretrained.tokens)
    max_tokens = manifest.model.context if pretrained is None else pretrained.max_tokens
    return {
        CONFIG: config_text(manifest, taken[TRUNK].version, n_strides, library).encode(),
        INDEX: _json(index),
        GENERATION: _json(_generation(manifest.model.context, pretrained)),
        **{name: files(exported).joinpath(name).read_bytes() for name in CODE[manifest.model.trunk]},
        CARD: card.encode(),
        **tokenizer_files(tokenizer, max_tokens, tokens),
    }


def _generation(context: int, pretrained: PretrainedParts | None) -> dict[str, Any]:
    """How text is drawn from the model unless somebody says otherwise: from a pretrained one as its own files say."""
    if pretrained is None:
        return {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": max(1, context // 2)}
    own = pretrained.generation()
    return own if "max_length" in own else {"max_new_tokens": max(1, context // 2), **own}


def _json(table: object) -> bytes:
    return (json.dumps(table, indent=2) + "\n").encode()

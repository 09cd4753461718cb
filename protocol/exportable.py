"""Which runs can leave their swarm as a model: those whose manifest asks for nothing that an export would leave out."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, Final

from common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from _typeshed import DataclassInstance

    from protocol.manifest import Manifest

NAMES: Final = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "smear": "smear",
    "expert_kind": "expert_kind",
    "expert_hidden": "expert_hidden",
    "experts_per_layer": "num_experts",
    "experts_per_block": "experts_per_block",
    "experts_per_token": "num_experts_per_tok",
    "gate": "gate",
    "gate_reads": "gate_reads",
    "gate_heads": "gate_heads",
    "gate_shortest": "gate_shortest",
    "gate_score": "gate_score",
}
"""Fields of a manifest's model, and what `config.json` of an exported model calls them."""

OF_OWN_TRUNK: Final = frozenset({"n_layers", "n_heads", "context", "smear"})
"""Those of them that a model around a pretrained one does not have under these names: they are that one's own."""

TRAINING_ONLY: Final = frozenset({"capacity_factor", "balance_rate", "balance"})
OF_THE_RUN: Final = frozenset(
    {
        *("name", "seed", "owner", "protocol_version", "minimum_version", "codec", "dtype"),
        *("model", "optimizer", "averaging", "data", "pretrained"),
    }
)


def check_exportable(manifest: Manifest) -> None:
    """Raise ConfigError for a run whose manifest asks for something that an export would leave out."""
    _check_known("model.", manifest.model, NAMES.keys() | TRAINING_ONLY | {"trunk"})
    _check_known("data.", manifest.data, {"tokenizer", "tokenizer_bytes"})
    _check_known("pretrained.", manifest.pretrained, {"files", "dtype", "attach", "unfreeze"})
    _check_known("", manifest, OF_THE_RUN)


def _check_known(prefix: str, table: DataclassInstance, known: AbstractSet[str]) -> None:
    """A field that is younger than this may be at its default only."""
    for field in fields(table):
        value = getattr(table, field.name)
        if field.name not in known and value != _default(field):
            raise ConfigError(
                f"the manifest's {prefix}{field.name} is {str(value)[:60]!r}, which an exported model cannot have yet: "
                "this run cannot be exported"
            )


def _default(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()

"""`config.json` of an exported model: what its manifest says of the model, under the names that transformers has.

All of it is there that inference goes by, so that no manifest, whose form may change, is needed to read a folder.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import tomli_w

from common.errors import CheckpointError, ConfigError, ManifestError
from node.model.rope import ROPE_BASE
from node.model.transformer import NORM_EPS
from node.trainer.exported.layout import CODE, CONFIG
from node.trainer.exported.sums import read_bounded
from protocol.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from _typeshed import DataclassInstance

MODEL_TYPE: Final = "kilohive"
FORMAT: Final = 1
MAX_CONFIG_BYTES = 1 << 20

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
"""Fields of a manifest's model, and what `config.json` calls them."""

TRAINING_ONLY: Final = frozenset({"capacity_factor", "balance_rate", "balance"})
OF_THE_RUN: Final = frozenset(
    {
        *("name", "seed", "owner", "protocol_version", "minimum_version", "codec", "dtype"),
        *("model", "optimizer", "averaging", "data"),
    }
)
DTYPE_NAMES: Final = {"fp32": "float32", "fp64": "float64"}


@dataclass(frozen=True, kw_only=True)
class ExportedConfig:
    """What `config.json` says.

    `manifest` has the model, the tokenizer, and the seed by which text is held out; all else in it is at its defaults,
    so that its own run id is not the run's.
    """

    run_id: str
    trunk_version: int
    manifest: Manifest


def check_exportable(manifest: Manifest) -> None:
    """Raise ConfigError for a run whose manifest asks for something that an export would leave out."""
    _check_known("model.", manifest.model, NAMES.keys() | TRAINING_ONLY)
    _check_known("data.", manifest.data, {"tokenizer", "tokenizer_bytes"})
    _check_known("", manifest, OF_THE_RUN)


def config_text(manifest: Manifest, trunk_version: int, n_strides: int) -> str:
    """The file's text; `n_strides` is how many strides a gate `hash` has to choose from, 0 for other gates."""
    shape = {told: getattr(manifest.model, name) for name, told in NAMES.items()}
    run = {
        "format": FORMAT,
        "run_id": manifest.run_id,
        "trunk_version": trunk_version,
        "seed": manifest.seed,
        "tokenizer": manifest.data.tokenizer,
        "tokenizer_bytes": manifest.data.tokenizer_bytes,
    }
    module = CODE.removesuffix(".py")
    table = {
        "architectures": ["KilohiveForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.KilohiveConfig",
            "AutoModelForCausalLM": f"{module}.KilohiveForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": DTYPE_NAMES[manifest.dtype],
        **shape,
        "gate_strides": n_strides,
        "norm_eps": NORM_EPS,
        "rope_base": ROPE_BASE,
        "tie_word_embeddings": False,
        "use_cache": True,
        "kilohive": run,
    }
    return json.dumps(table, indent=2) + "\n"


def read_config(folder: Path) -> ExportedConfig:
    """What `folder` says of its model, every field checked. Raises CheckpointError in one sentence."""
    path = folder / CONFIG
    try:
        table = json.loads(read_bounded(path, MAX_CONFIG_BYTES))
        return _checked(table)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not JSON; take the folder again, whole") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not that of a model that `export` wrote: {error!r:.100}") from None
    except ManifestError as error:
        raise CheckpointError(f"{path}: {error}") from None


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


def _checked(table: Any) -> ExportedConfig:  # noqa: ANN401 - JSON can be anything
    run = table["kilohive"]
    if table["model_type"] != MODEL_TYPE or run["format"] != FORMAT:
        raise TypeError(f"model_type {table['model_type']!r}, format {run['format']!r}")
    dtypes = {told: name for name, told in DTYPE_NAMES.items()}
    manifest = Manifest.from_toml(
        tomli_w.dumps(
            {
                "name": "exported",
                "seed": run["seed"],
                "dtype": dtypes[table["dtype"]],
                "model": {name: table[told] for name, told in NAMES.items()},
                "data": {"tokenizer": run["tokenizer"], "tokenizer_bytes": run["tokenizer_bytes"]},
            }
        )
    )
    return ExportedConfig(run_id=str(run["run_id"]), trunk_version=int(run["trunk_version"]), manifest=manifest)

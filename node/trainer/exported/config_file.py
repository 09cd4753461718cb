"""`config.json` of an exported model: what its manifest says of the model, under the names that transformers has.

All of it is there that inference goes by, so that no manifest, whose form may change, is needed to read a folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import tomli_w

from common.errors import CheckpointError, ManifestError
from node.model.rope import ROPE_BASE
from node.model.transformer import NORM_EPS
from node.trainer.exported.layout import CODE, CONFIG
from node.trainer.exported.sums import read_bounded
from protocol.exportable import NAMES
from protocol.manifest import Manifest

if TYPE_CHECKING:
    from pathlib import Path

MODEL_TYPE: Final = "kilohive"
FORMAT: Final = 1
MAX_CONFIG_BYTES = 1 << 20

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
    module = CODE[0].removesuffix(".py")
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

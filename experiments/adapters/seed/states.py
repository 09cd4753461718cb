"""Windows of the domains' texts, and what enters the first adapted layer for each: the frozen layers run once per text.

The table of tokens is most of what is left above them, so it is cut to the tokens that occur in these texts.
Shapes: W windows, B of them, T tokens of a window's input, D model width, V tokens that occur.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from common.folders import locked
from experiments.adapters.domains import DOMAINS, WEAK, parted, windows
from experiments.adapters.seed.package import SEED_FILE, SEED_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import nn

    from experiments.adapters.domains import Domain, DomainName
    from experiments.adapters.seed.model import Seed, SeedModel

    Progress = Callable[[float, float, str], None]

TEXT_SEED = 0
BATCH_WINDOWS = 8


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


@dataclass(frozen=True)
class Upper:
    """The seed from layer `start` on, foretelling only the tokens of its texts, `vocabulary_V`, by their rows.

    What it is to foretell are places in that vocabulary.
    """

    model: SeedModel
    start: int
    vocabulary_V: torch.Tensor
    head_VD: torch.Tensor

    def nats(self, x_BTD: torch.Tensor, targets_BT: torch.Tensor, adapters: Mapping[int, nn.Module]) -> torch.Tensor:
        """Cross-entropy of each target [B, T], with `adapters` around the FFNs of those layers that have one."""
        x_BTD = self.model.normalised(self.model.run(x_BTD, self.start, adapters=adapters))
        logits_NV = functional.linear(x_BTD, self.head_VD).flatten(0, 1)
        return functional.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none").view_as(targets_BT)


@dataclass(frozen=True)
class States:
    """What enters the first adapted layer for some windows (float32, memory-mapped), and the tokens to predict."""

    x_WTD: NDArray[np.float32]
    targets_WT: torch.Tensor

    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the windows `index` into memory."""
        return torch.from_numpy(self.x_WTD[index.numpy()]), self.targets_WT[index]

    def first(self, n_windows: int) -> States:
        """The first of them."""
        return States(self.x_WTD[:n_windows], self.targets_WT[:n_windows])

    def __len__(self) -> int:
        return len(self.targets_WT)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What adapters learn from and are tuned on, where the seed is weak; what they are tested on: English too."""

    upper: Upper
    training: dict[DomainName, States]
    tuning: dict[DomainName, States]
    held_out: dict[DomainName, States]


@dataclass(frozen=True)
class Frozen:
    """A seed, and the folder that holds what its lower layers gave for the texts so far."""

    seed: Seed
    folder: Path

    def texts(self, read: Callable[[DomainName], Domain], plan: TextPlan, progress: Progress) -> Texts:
        """Return the texts, the same windows in every trial: seeds draw experts, not texts."""
        training, tuning, held_out = ids = self._ids(read, plan)
        start = self.seed.model.shape.n_layers - plan.layers
        vocabulary_V = torch.unique(torch.cat([ids_WT.flatten() for part in ids for ids_WT in part.values()]))

        def states(part: dict[DomainName, torch.Tensor]) -> dict[DomainName, States]:
            found = {}
            for number, (name, ids_WT) in enumerate(part.items()):
                progress(number, len(part), f"frozen layers over {name}")
                targets_WT = torch.searchsorted(vocabulary_V, ids_WT[:, 1:].contiguous())
                found[name] = States(self._lower(ids_WT[:, :-1], start), targets_WT)
            return found

        upper = Upper(self.seed.model, start, vocabulary_V, self.seed.model.embed(vocabulary_V))
        return Texts(upper=upper, training=states(training), tuning=states(tuning), held_out=states(held_out))

    def _ids(
        self, read: Callable[[DomainName], Domain], plan: TextPlan
    ) -> tuple[dict[DomainName, torch.Tensor], dict[DomainName, torch.Tensor], dict[DomainName, torch.Tensor]]:
        """Tokens of the windows of training, tuning and held-out text."""
        training: dict[DomainName, torch.Tensor] = {}
        tuning: dict[DomainName, torch.Tensor] = {}
        held_out: dict[DomainName, torch.Tensor] = {}
        for name in DOMAINS:
            domain = read(name)
            held_out[name] = self._windows(domain.held_out, plan.held_out, plan)
            if name in WEAK:
                learnt, tuned = parted(domain.training)
                training[name] = self._windows(learnt, plan.training, plan)
                tuning[name] = self._windows(tuned, plan.tuning, plan)
        return training, tuning, held_out

    def _windows(self, documents: tuple[str, ...], n_windows: int, plan: TextPlan) -> torch.Tensor:
        return windows(documents, n_windows, plan.window_tokens + 1, self.seed.tokenizer.encode, TEXT_SEED)

    def _lower(self, ids_WT: torch.Tensor, stop: int) -> NDArray[np.float32]:
        """What enters layer `stop`: from the folder, or computed and put there, by one process at a time."""
        about = f"{SEED_FILE} {SEED_VERSION} below {stop} {tuple(ids_WT.shape)}"
        path = self.folder / f"{hashlib.sha256(about.encode() + ids_WT.numpy().tobytes()).hexdigest()[:32]}.npy"
        with locked(path.with_suffix(".lock")):
            if not path.is_file():
                self._write(path, ids_WT, stop)
        found: NDArray[np.float32] = np.load(path, mmap_mode="r")
        return found

    @torch.no_grad()
    def _write(self, path: Path, ids_WT: torch.Tensor, stop: int) -> None:
        """Whole or not at all: a batch at a time into a file beside it, which then takes its name."""
        model = self.seed.model
        shape = (*ids_WT.shape, model.shape.d_model)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            found = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            for start in range(0, len(ids_WT), BATCH_WINDOWS):
                rows = slice(start, start + BATCH_WINDOWS)
                found[rows] = model.run(model.embed(ids_WT[rows]), 0, stop).numpy()
            found.flush()
            temporary.replace(path)

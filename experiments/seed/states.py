"""Windows of the domains' texts, and what enters the first adapted layer for each: the frozen layers run once per text.

Shapes: W windows, T tokens of a window's input, D model width.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from experiments.domains import DOMAINS, WEAK, parted, windows
from experiments.seed.package import SEED_FILE, SEED_VERSION
from node.folders import locked

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from experiments.domains import Domain, DomainName
    from experiments.seed.model import Seed

    Progress = Callable[[float, float, str], None]

TEXT_SEED = 0
BATCH_WINDOWS = 8


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """Windows of each domain, tokens of each, and how many of the seed's uppermost layers are adapted."""

    training: int
    tuning: int
    held_out: int
    window_tokens: int = 128
    layers: int = 4


@dataclass(frozen=True)
class States:
    """Of some windows: what enters layer `start` (float32, memory-mapped), and the tokens to foretell."""

    start: int
    x_WTD: NDArray[np.float32]
    targets_WT: torch.Tensor

    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the windows `index`, in memory."""
        return torch.from_numpy(self.x_WTD[index.numpy()]), self.targets_WT[index]

    def first(self, n_windows: int) -> States:
        """The first of them."""
        return States(self.start, self.x_WTD[:n_windows], self.targets_WT[:n_windows])

    def __len__(self) -> int:
        return len(self.targets_WT)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What adapters learn from, what their rates are chosen by, and what they are tested on: English too.

    Tuning texts are documents of the training text that no adapter learns from.
    """

    training: dict[DomainName, States] = field(default_factory=dict)
    tuning: dict[DomainName, States] = field(default_factory=dict)
    held_out: dict[DomainName, States] = field(default_factory=dict)


@dataclass(frozen=True)
class Frozen:
    """The frozen part of a seed, and the folder that holds what it gave for the texts so far."""

    seed: Seed
    folder: Path

    def texts(self, read: Callable[[DomainName], Domain], plan: TextPlan, progress: Progress) -> Texts:
        """The same windows in every trial: seeds draw experts, not texts."""
        found = Texts()
        for number, name in enumerate(DOMAINS):
            progress(number, len(DOMAINS), f"frozen layers over {name}")
            domain = read(name)
            found.held_out[name] = self._states(domain.held_out, plan.held_out, plan)
            if name in WEAK:
                training, tuning = parted(domain.training)
                found.training[name] = self._states(training, plan.training, plan)
                found.tuning[name] = self._states(tuning, plan.tuning, plan)
        return found

    def _states(self, documents: tuple[str, ...], n_windows: int, plan: TextPlan) -> States:
        """From the folder, or computed and put there, by one process at a time."""
        ids = windows(documents, n_windows, plan.window_tokens + 1, self.seed.tokenizer.encode, TEXT_SEED)
        start = self.seed.model.shape.n_layers - plan.layers
        about = f"{SEED_FILE} {SEED_VERSION} below {start} {tuple(ids.shape)}"
        path = self.folder / f"{hashlib.sha256(about.encode() + ids.numpy().tobytes()).hexdigest()[:32]}.npy"
        with locked(path.with_suffix(".lock")):
            if not path.is_file():
                self._write(path, ids[:, :-1], start)
        return States(start, np.load(path, mmap_mode="r"), ids[:, 1:].contiguous())

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

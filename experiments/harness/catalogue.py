"""Which experiments there are. A module each, imported when it is asked for: torch takes seconds."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    from experiments.harness.experiment import Experiment

MODULES = {
    "adapters": "experiments.adapters.experiment",
    "apart": "experiments.apart.experiment",
    "choosing": "experiments.arms.choosing",
    "granularity": "experiments.arms.granularity",
    "idiots": "experiments.arms.idiots",
    "longer": "experiments.arms.longer",
    "merging": "experiments.merging.branches",
    "merging-adapters": "experiments.merging.adapters",
    "sequential": "experiments.sequential.experiment",
    "swarm": "experiments.swarm.experiment",
    "thousands": "experiments.arms.thousands",
    "tokens": "experiments.arms.tokens",
}


def load(name: str) -> Experiment:
    """The experiment of that name; ConfigError names those that there are."""
    if name not in MODULES:
        raise ConfigError(f"no experiment {name!r}; it is one of {', '.join(MODULES)}")
    return experiment_in(MODULES[name])


def experiment_in(module: str) -> Experiment:
    """The one that a module holds."""
    experiment: Experiment = importlib.import_module(module).EXPERIMENT
    return experiment

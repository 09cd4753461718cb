"""One code path for CPU and CUDA: which device `--device` means."""

from __future__ import annotations

import torch

from protocol.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA if there is any; raises ConfigError saying what this machine has."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device: {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"--device: {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device: {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return device

"""What a host's owner lets it take. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What a host may take of the machine that it is a guest on, and when. Shown by `host --help-settings`."""

    max_memory: str = ""
    """Take at most this much memory, with p2pd, such as 600MB. A container's own limit counts too, if it is lower."""
    max_gpu_memory: str = ""
    """Take at most this much memory on the GPU, such as 4GB."""
    max_bandwidth_up: str = ""
    """Send at most this much on average, such as 2MB/s; at least 0.5MB/s."""
    max_bandwidth_down: str = ""
    """Receive at most this much on average, such as 2MB/s; at least 0.5MB/s."""
    max_cpu_percent: float = 0.0
    """Use at most this share of one core on average, in percent; 400 is four cores, 0 sets no limit."""
    max_disk: str = ""
    """Let the folder --state grow to at most this size, such as 2GB."""
    schedule: str = ""
    """Work at these hours by this machine's clock, such as 22:00-07:00, or several separated by commas."""
    only_when_idle: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Work only while nobody else needs the machine."""
    on_battery: FileOnly[bool] = False
    """Work also while the machine runs on its battery."""
    not_while: FileOnly[tuple[str, ...]] = ()
    """Do not work while a program of one of these names runs, such as steam."""
    not_while_gpu_percent: FileOnly[float] = 0.0
    """Do not work while other programs take more than this share of the GPU, in percent; 0 sets no limit."""

"""What a host's owner lets it take. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What a host may take of the machine that it is a guest on, and when. Shown by `host --help-limits`."""

    max_memory: str = ""
    """Memory for the node and its child process, such as 600MB. A container's own limit counts too, if it is lower."""
    max_gpu_memory: str = ""
    """Memory on the GPU, such as 4GB."""
    max_bandwidth_up: str = ""
    """Mean rate of what it sends, such as 2MB/s; at least 0.5MB/s."""
    max_bandwidth_down: str = ""
    """Mean rate of what it receives, such as 2MB/s; at least 0.5MB/s."""
    max_cpu_percent: float = 0.0
    """Mean share of one core, in percent; 400 is four cores, 0 no limit."""
    max_disk: str = ""
    """Size of the folder --state, such as 2GB."""
    schedule: str = ""
    """Hours of the day at which to work, such as 22:00-07:00, or several parted by commas; by this machine's clock."""
    only_when_idle: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Work only while nobody else needs the machine."""

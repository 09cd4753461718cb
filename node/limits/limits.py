"""The limits that an owner has set, as numbers; None where there is none."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from common.errors import ConfigError
from common.sizes import parse_rate, parse_size
from node.limits.schedule import Schedule

if TYPE_CHECKING:
    from node.limits.config import LimitsConfig

MIN_BYTES_PER_S = 500_000
"""A piece of averaging, of up to 1 MB, must pass before its receiver takes the sender for dead."""

MAX_PROGRAMS, MAX_PROGRAM_CHARS = 64, 255
MAX_PERCENT = 100.0

MIN_CPU_PERCENT = 5.0
"""A host that only stays in the swarm takes about half of that."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits in bytes, bytes a second, percent of one core, and of the GPU."""

    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    up_bytes_per_s: int | None = None
    down_bytes_per_s: int | None = None
    cpu_percent: float | None = None
    disk_bytes: int | None = None
    schedule: Schedule | None = None
    only_when_idle: bool = False
    on_battery: bool = False
    not_while: tuple[str, ...] = ()
    not_while_gpu_percent: float | None = None

    @classmethod
    def of(cls, config: LimitsConfig) -> Limits:
        """What flags and file say; raises ConfigError for one that cannot be kept."""
        if config.max_cpu_percent and not MIN_CPU_PERCENT <= config.max_cpu_percent < float("inf"):
            raise ConfigError(f"--max-cpu-percent: must be {MIN_CPU_PERCENT:g} or more, or 0 for no limit")
        return cls(
            memory_bytes=parse_size("--max-memory", config.max_memory),
            gpu_memory_bytes=parse_size("--max-gpu-memory", config.max_gpu_memory),
            up_bytes_per_s=_rate("--max-bandwidth-up", config.max_bandwidth_up),
            down_bytes_per_s=_rate("--max-bandwidth-down", config.max_bandwidth_down),
            cpu_percent=config.max_cpu_percent or None,
            disk_bytes=parse_size("--max-disk", config.max_disk),
            schedule=Schedule.parse(config.schedule) if config.schedule else None,
            only_when_idle=config.only_when_idle,
            on_battery=config.on_battery,
            not_while=_program_names(config.not_while),
            not_while_gpu_percent=_gpu_percent(config.not_while_gpu_percent),
        )

    def told(self) -> dict[str, object]:
        """Return the limits that are set, for the event log."""
        own = {**asdict(self), "schedule": self.schedule and str(self.schedule)}
        return {name: value for name, value in own.items() if value}


def _rate(flag: str, text: str) -> int | None:
    rate = parse_rate(flag, text)
    if rate is not None and rate < MIN_BYTES_PER_S:
        raise ConfigError(
            f"{flag}: is {text[:40]!r}, must be 0.5MB/s or more: a piece of averaging has to pass within 5 s"
        )
    return rate


def _program_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) > MAX_PROGRAMS:
        raise ConfigError(f"not_while: names {len(names)} programs, may name {MAX_PROGRAMS} at most")
    for name in names:
        if not name or name.isspace() or len(name) > MAX_PROGRAM_CHARS or "/" in name or not name.isprintable():
            raise ConfigError(f"not_while: {name[:40]!r} is no name of a program, such as steam, without its folder")
    return names


def _gpu_percent(percent: float) -> float | None:
    if not 0 <= percent < MAX_PERCENT:
        raise ConfigError(f"not_while_gpu_percent: must be below {MAX_PERCENT:g}, or 0 for no limit, is {percent:g}")
    return percent or None

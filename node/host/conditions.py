"""The owner's conditions for working: what each looks at, how often, and how long it waits before work begins again.

A new one is a `look` in a module of its own, and a line in `conditions_of`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from node.host.availability import Reason
from node.host.idle import IDLE_FOR_S, SAMPLE_S, Person, Processors
from node.limits.finding import Finding
from node.limits.gpu_use import GpuUse
from node.limits.power import power_look
from node.limits.programs import Programs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from node.host.owner_pause import OwnerPause
    from node.limits.limits import Limits
    from node.limits.process_usage import ProcessUse
    from node.limits.schedule import Schedule

LOOK_S = 5.0
OWNER_LOOK_S = 1.0
PERSON_LOOK_S = 10.0
"""A look asks the login manager, through a process."""

SETTLE_S = 10.0
"""A plug that is moved, or a program that starts itself anew, is no end."""

OUTSIDE_SCHEDULE = Finding("it is outside its schedule")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition: `look` finds out every `every_s` seconds whether it is against working.

    Work begins again once nothing was found for `settle_s`. `blocks`: looking touches the disk, a bus or a driver, and
    is done on a thread.
    """

    reason: Reason
    look: Callable[[], Finding]
    until_s: Callable[[], float | None] = lambda: None
    every_s: float = LOOK_S
    settle_s: float = 0.0
    blocks: bool = True


def conditions_of(limits: Limits, owner: OwnerPause, use: ProcessUse, device: torch.device) -> Iterator[Condition]:
    """Return the conditions that the owner has set. `use` measures what this host itself takes of the processors."""
    yield Condition(
        reason=Reason.OWNER, look=owner.look, until_s=lambda: owner.until_s, every_s=OWNER_LOOK_S, blocks=False
    )
    if limits.schedule is not None:
        yield Condition(reason=Reason.SCHEDULE, look=partial(look_at_schedule, limits.schedule), blocks=False)
    if limits.only_when_idle:
        yield Condition(reason=Reason.PROCESSORS, look=Processors(use).look, every_s=SAMPLE_S, settle_s=IDLE_FOR_S)
        yield Condition(reason=Reason.PERSON, look=Person().look, every_s=PERSON_LOOK_S, settle_s=IDLE_FOR_S)
    if not limits.on_battery:
        yield Condition(reason=Reason.BATTERY, look=power_look(), settle_s=SETTLE_S)
    if limits.not_while:
        yield Condition(reason=Reason.PROGRAM, look=Programs(limits.not_while).look, settle_s=SETTLE_S)
    if limits.not_while_gpu_percent is not None and device.type == "cuda":
        gpu = GpuUse(_uuid(device), limits.not_while_gpu_percent)
        yield Condition(reason=Reason.GPU, look=gpu.look, settle_s=IDLE_FOR_S)


def look_at_schedule(schedule: Schedule, local_time: Callable[[], time.struct_time] = time.localtime) -> Finding:
    """Look whether this hour is one of its spans."""
    return Finding() if schedule.allows(local_time()) else OUTSIDE_SCHEDULE


def _uuid(device: torch.device) -> str:
    """How NVML knows the GPU: the numbers of CUDA are others where not all GPUs are visible."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"

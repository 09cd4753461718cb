"""How much of an NVIDIA GPU other programs take, as its driver tells through NVML.

The package nvidia-ml-py is not needed to run a host, only for this: it is imported at the first look.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Protocol, cast

from node.limits.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

BUSY_LOOKS = 2
"""Looks in a row at which others take too much: a window that opens is no reason."""

NOT_SUPPORTED, NOT_FOUND = 3, 6
"""NVML's return codes: a GPU that does not tell this, and one on which nothing has computed since the last look."""

NOT_AVAILABLE = (1 << 64) - 1
"""What some releases of nvidia-ml-py give for memory that the driver does not tell; others give None."""


class GpuProcess(Protocol):
    """A process that has memory of the GPU, in bytes."""

    pid: int
    usedGpuMemory: int | None


class GpuSample(Protocol):
    """What a process lately took of the GPU's time, in percent; `timeStamp` in microseconds."""

    pid: int
    timeStamp: int
    smUtil: int


class GpuMemory(Protocol):
    """The memory of a GPU, in bytes."""

    total: int


class Nvml(Protocol):
    """What is asked of the module `pynvml` of nvidia-ml-py, under NVML's own names. All may raise NVMLError."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None:  # noqa: N802
        """Connect to the driver."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:  # noqa: N802
        """Find a GPU."""

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> GpuMemory:  # noqa: N802
        """Tell how much memory it has."""

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> Sequence[GpuProcess]:  # noqa: N802
        """Tell which processes compute on it."""

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object) -> Sequence[GpuProcess]:  # noqa: N802
        """Tell which processes draw on it."""

    def nvmlDeviceGetProcessUtilization(self, handle: object, since_us: int) -> Sequence[GpuSample]:  # noqa: N802
        """Tell what each process has taken of it since then; raises NVMLError NOT_FOUND if none has."""


class _NotToldError(Exception):
    """The driver answers, but not what is asked."""


def import_nvml() -> Nvml:
    """The module; raises ImportError where nvidia-ml-py is not installed."""
    return cast("Nvml", importlib.import_module("pynvml"))


class GpuUse:
    """Looks whether others take more than `percent` of the GPU `uuid`: of its time or, if only that is told, memory."""

    def __init__(
        self, uuid: str, percent: float, load: Callable[[], Nvml] = import_nvml, own_pid: int | None = None
    ) -> None:
        self._uuid, self._percent, self._load, self._own_pid = uuid, percent, load, own_pid or os.getpid()
        self._connected = False
        self._seen_us = 0
        self._busy_looks = 0

    def look(self) -> Finding:
        """Look at it now."""
        try:
            percent = self._others_percent(self._load())
        except ImportError:
            return _unknown("the Python package nvidia-ml-py is not installed")
        except _NotToldError as error:
            return _unknown(str(error))
        self._busy_looks = self._busy_looks + 1 if percent > self._percent else 0
        return Finding("another program uses the GPU") if self._busy_looks >= BUSY_LOOKS else Finding()

    def _others_percent(self, nvml: Nvml) -> float:
        try:
            if not self._connected:
                nvml.nvmlInit()
            self._connected = True
            return self._ask(nvml, nvml.nvmlDeviceGetHandleByUUID(self._uuid))
        except nvml.NVMLError as error:
            self._connected = False  # a driver that was updated or has crashed wants a new connection
            raise _NotToldError(f"its driver says: {error}") from None

    def _ask(self, nvml: Nvml, handle: object) -> float:
        computing = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        if self._own_pid not in {process.pid for process in computing}:
            raise _NotToldError("its driver numbers processes otherwise, as outside of a container")
        try:
            return self._share_of_time(nvml.nvmlDeviceGetProcessUtilization(handle, self._seen_us))
        except nvml.NVMLError as error:
            code = getattr(error, "value", None)
            if code == NOT_FOUND:
                return 0.0
            if code != NOT_SUPPORTED:
                raise
        drawing = nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
        return self._share_of_memory([*computing, *drawing], nvml.nvmlDeviceGetMemoryInfo(handle).total)

    def _share_of_time(self, samples: Iterable[GpuSample]) -> float:
        """Add up the newest sample of each other process, but for those that were seen before."""
        seen_us = self._seen_us
        newest: dict[int, GpuSample] = {}
        for sample in samples:
            if sample.timeStamp > max(seen_us, newest[sample.pid].timeStamp if sample.pid in newest else 0):
                newest[sample.pid] = sample
        self._seen_us = max((sample.timeStamp for sample in newest.values()), default=seen_us)
        return float(sum(sample.smUtil for sample in newest.values() if sample.pid != self._own_pid))

    def _share_of_memory(self, processes: Iterable[GpuProcess], total_bytes: int) -> float:
        """Add up the memory of other processes, of which one that both computes and draws is listed twice."""
        others = {one.pid: one.usedGpuMemory for one in processes if one.pid != self._own_pid}
        if any(n_bytes is None or n_bytes == NOT_AVAILABLE for n_bytes in others.values()):
            raise _NotToldError("its driver tells neither time nor memory of each process")
        return 100.0 * sum(n_bytes or 0 for n_bytes in others.values()) / max(1, total_bytes)


def _unknown(why: str) -> Finding:
    return Finding(unknown=f"whether other programs use the GPU is not known ({why}): it counts as not used")

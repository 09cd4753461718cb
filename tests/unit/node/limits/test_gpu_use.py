"""A GPU that others use too, as a fake of nvidia-ml-py tells it, in the shapes in which the real one does."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from node.limits.finding import Finding
from node.limits.gpu_use import NOT_AVAILABLE, NOT_FOUND, NOT_SUPPORTED, GpuUse, import_nvml

OWN, GAME, DESKTOP = 4321, 5000, 900
UUID = "GPU-5a1bd0c5-7b9e-43a5-a1ae-9d6f2b0e6b11"
BUSY = Finding("another program uses the GPU")


class NVMLError(Exception):
    """As in pynvml: `value` is NVML's return code."""

    def __init__(self, value: int, words: str = "") -> None:
        super().__init__(words)
        self.value = value


class FakeNvml:
    """One GPU of 8 GB, on which this process computes, a desktop draws and a game may run."""

    NVMLError: type[Exception] = NVMLError

    def __init__(self) -> None:
        self.initialised = 0
        self.now_us = 1_700_000_000_000_000
        self.percent: dict[int, int] = {OWN: 95, DESKTOP: 4}
        self.computing: dict[int, int | None] = {OWN: 2 << 30}
        self.drawing: dict[int, int | None] = {DESKTOP: 1 << 29}
        self.failure: NVMLError | None = None

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        self.initialised += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:  # noqa: N802 - NVML's name
        assert uuid == UUID
        if self.failure is not None and self.failure.value not in {NOT_FOUND, NOT_SUPPORTED}:
            raise self.failure
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Any:  # noqa: N802 - NVML's name
        return SimpleNamespace(total=8 << 30, used=3 << 30, free=5 << 30)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Any]:  # noqa: N802 - NVML's name
        return [SimpleNamespace(pid=pid, usedGpuMemory=n) for pid, n in self.computing.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object) -> list[Any]:  # noqa: N802 - NVML's name
        return [SimpleNamespace(pid=pid, usedGpuMemory=n) for pid, n in self.drawing.items()]

    def nvmlDeviceGetProcessUtilization(self, handle: object, since_us: int) -> list[Any]:  # noqa: N802 - NVML's name
        """Several samples of a process, the older ones too; those from before `since_us` come along at times."""
        if self.failure is not None:
            raise self.failure
        self.now_us += 5_000_000
        old = [self._sample(pid, 100, self.now_us - 4_000_000) for pid in self.percent]
        stale = [self._sample(GAME, 100, since_us)] if since_us else []
        return [*stale, *old, *(self._sample(pid, percent, self.now_us) for pid, percent in self.percent.items())]

    @staticmethod
    def _sample(pid: int, percent: int, at_us: int) -> Any:
        return SimpleNamespace(pid=pid, timeStamp=at_us, smUtil=percent, memUtil=3, encUtil=0, decUtil=0)


def gpu_use(nvml: FakeNvml, percent: float = 25.0) -> GpuUse:
    return GpuUse(UUID, percent, lambda: nvml, OWN)


def test_what_this_host_and_a_desktop_take_is_no_reason() -> None:
    gpu = gpu_use(FakeNvml())
    assert [gpu.look() for _ in range(4)] == [Finding()] * 4


def test_a_game_is_a_reason_once_it_is_seen_twice_and_until_it_ends() -> None:
    nvml = FakeNvml()
    gpu = gpu_use(nvml)
    nvml.percent[GAME] = 30
    assert [gpu.look(), gpu.look(), gpu.look()] == [Finding(), BUSY, BUSY]
    del nvml.percent[GAME]
    assert gpu.look() == Finding()


def test_a_window_that_opens_is_passed_over() -> None:
    nvml = FakeNvml()
    gpu = gpu_use(nvml)
    seen = []
    for percent in (90, 2, 90, 2):
        nvml.percent[DESKTOP] = percent
        seen.append(gpu.look())
    assert seen == [Finding()] * 4


def test_what_several_take_together_counts() -> None:
    nvml = FakeNvml()
    nvml.percent |= {GAME: 15, DESKTOP: 15}
    gpu = gpu_use(nvml)
    assert [gpu.look(), gpu.look()] == [Finding(), BUSY]


def test_a_gpu_on_which_nothing_has_computed_lately_is_free() -> None:
    nvml = FakeNvml()
    nvml.failure = NVMLError(NOT_FOUND, "Not Found")
    gpu = gpu_use(nvml)
    assert [gpu.look(), gpu.look()] == [Finding()] * 2


@pytest.mark.parametrize(
    ("computing", "drawing", "finding"),
    [
        pytest.param({}, {DESKTOP: 1 << 29}, Finding(), id="a desktop alone"),
        pytest.param({GAME: 3 << 30}, {}, BUSY, id="another program that computes"),
        pytest.param({GAME: 3 << 29}, {GAME: 3 << 29}, Finding(), id="one in both lists counts once"),
    ],
)
def test_a_gpu_that_tells_no_times_is_judged_by_its_memory(
    computing: dict[int, int | None], drawing: dict[int, int | None], finding: Finding
) -> None:
    nvml = FakeNvml()
    nvml.failure = NVMLError(NOT_SUPPORTED, "Not Supported")
    nvml.computing, nvml.drawing = nvml.computing | computing, drawing
    gpu = gpu_use(nvml)
    gpu.look()
    assert gpu.look() == finding


@pytest.mark.parametrize("n_bytes", [None, NOT_AVAILABLE])
def test_a_gpu_that_tells_neither_is_not_known(n_bytes: int | None) -> None:
    nvml = FakeNvml()
    nvml.failure, nvml.computing[GAME] = NVMLError(NOT_SUPPORTED), n_bytes
    assert "its driver tells neither time nor memory of each process" in gpu_use(nvml).look().unknown


def test_in_a_container_whose_processes_have_other_numbers_outside_it_is_not_known() -> None:
    nvml = FakeNvml()
    nvml.computing = {77_000: 2 << 30}
    finding = gpu_use(nvml).look()
    assert finding.against == ""
    assert finding.unknown == (
        "whether other programs use the GPU is not known (its driver numbers processes otherwise, as outside of a "
        "container): it counts as not used"
    )


def test_a_driver_that_was_lost_is_a_sentence_and_connected_anew() -> None:
    nvml = FakeNvml()
    gpu = gpu_use(nvml)
    assert gpu.look() == Finding()
    nvml.failure = NVMLError(15, "GPU is lost")
    assert "(its driver says: GPU is lost)" in gpu.look().unknown
    nvml.failure = None
    assert gpu.look() == Finding()
    assert nvml.initialised == 2


def test_without_the_package_it_is_not_known_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    finding = GpuUse(UUID, 25.0, import_nvml).look()
    assert finding.against == ""
    assert "(the Python package nvidia-ml-py is not installed): it counts as not used" in finding.unknown

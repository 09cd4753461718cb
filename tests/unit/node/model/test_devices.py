"""Which device a name means, what it may take, and how it says that it is full: without any GPU."""

from __future__ import annotations

import pytest
import torch

from common.errors import ConfigError, NoRoomError
from node.model import devices
from node.model.devices import (
    device_problem,
    is_out_of_memory,
    limit_device_memory,
    no_capacity_is_an_error,
    pick_device,
)

CUDA, MPS, CPU = torch.device("cuda"), torch.device("mps"), torch.device("cpu")


def machine(monkeypatch: pytest.MonkeyPatch, *, n_cuda: int = 0, mps: bool = False, problem: str = "") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(devices, "device_problem", lambda _: problem)


def test_auto_takes_cuda_where_there_is_any_and_mps_only_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, n_cuda=2, mps=True)
    assert [pick_device(name) for name in ("auto", "cuda:1", "mps", "cpu")] == [CUDA, torch.device("cuda:1"), MPS, CPU]
    machine(monkeypatch, mps=True)
    assert pick_device("auto") == CPU


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("abacus", "'abacus' is not a device; use auto, cpu, cuda, cuda:N or mps"),
        ("meta", "'meta' is not supported; use auto"),
        ("cuda:2", "but this machine has 2 CUDA devices; use cpu"),
        ("mps", "but this machine has no GPU of Apple's; use cpu"),
    ],
)
def test_a_device_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch, name: str, problem: str) -> None:
    machine(monkeypatch, n_cuda=2)
    with pytest.raises(ConfigError, match=f"--device: .*{problem}"):
        pick_device(name)


def test_a_gpu_that_is_there_and_does_not_compute_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, n_cuda=1, problem="no kernel image is available")
    assert pick_device("auto") == CPU
    assert "does not compute (no kernel image is available): this node uses the CPU" in caplog.text
    with pytest.raises(ConfigError, match=r"--device: 'cuda' is there and does not compute \(no kernel image"):
        pick_device("cuda")


def test_a_device_is_tried_with_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_problem(CPU) == ""
    assert "meta" in device_problem(torch.device("meta"))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(8, 8))
    assert device_problem(CPU) == "it computes a wrong product"


def test_a_gpu_is_told_its_limit_as_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[float, torch.device]] = []
    about = type("About", (), {"total_memory": 16_000_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *share: shares.append(share))
    limit_device_memory(CUDA, 4_000_000_000)
    limit_device_memory(CUDA, 99_000_000_000)
    limit_device_memory(CUDA, None)
    assert shares == [(0.25, CUDA), (1.0, CUDA)]
    with pytest.raises(ConfigError, match="--max-gpu-memory: this host runs on the CPU"):
        limit_device_memory(CPU, 4_000_000_000)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
)
def test_every_back_ends_way_to_say_that_memory_is_full_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="sizes differ"), no_capacity_is_an_error():
        raise RuntimeError("sizes differ")
    with pytest.raises(NoRoomError, match="no memory left"), no_capacity_is_an_error():
        raise MemoryError


def test_what_torch_really_says_when_the_machine_is_full_is_known() -> None:
    with pytest.raises(NoRoomError), devices.no_capacity_is_an_error():
        torch.empty(1 << 60, dtype=torch.uint8)

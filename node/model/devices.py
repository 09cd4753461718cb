"""One code path for CPU, CUDA and Apple's GPUs: which device `--device` means, and what it says when it is full."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from common.errors import ConfigError, NoRoomError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory")
KINDS = "use auto, cpu, cuda, cuda:N or mps"


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA if there is any that computes; raises ConfigError saying what this machine has."""
    if name == "auto":
        return _automatic_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device: {name!r} is not a device; {KINDS}") from None
    if device.type not in {"cpu", "cuda", "mps"}:
        raise ConfigError(f"--device: {name!r} is not supported; {KINDS}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device: {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device: {name!r}, but this machine has no GPU of Apple's; use cpu")
    if problem := device_problem(device):
        raise ConfigError(f"--device: {name!r} is there and does not compute ({problem}); mend its driver, or use cpu")
    return device


def _automatic_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if problem := device_problem(torch.device("cuda")):
        logger.warning("There is a GPU, but it does not compute (%s): this node uses the CPU", problem)
        return torch.device("cpu")
    return torch.device("cuda")


def device_problem(device: torch.device) -> str:
    """Why a device that is there does not compute: a GPU that this torch has no kernels for, one in use, a driver.

    Empty if a small product comes out right.
    """
    try:
        ones = torch.ones(8, 8, device=device)
        return "" if float((ones @ ones).sum()) == 8.0**3 else "it computes a wrong product"
    except RuntimeError as error:
        return first_line(error)


def first_line(error: BaseException) -> str:
    """What an error of torch's says, in one line: some go on for twenty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def knows_float64(device: torch.device) -> bool:
    """Apple's GPUs do not: what needs it is done on the CPU there."""
    return device.type != "mps"


def limit_device_memory(device: torch.device, n_bytes: int | None) -> None:
    """Let torch take no more than that on a GPU; raises ConfigError where there is none to limit."""
    if n_bytes is None:
        return
    if device.type == "cpu":
        raise ConfigError("--max-gpu-memory: this host runs on the CPU; leave it out, or choose a GPU with --device")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / total), device)
    else:
        recommended = torch.mps.recommended_max_memory()
        torch.mps.set_per_process_memory_fraction(min(2.0, n_bytes / recommended))


def device_memory(device: torch.device) -> int | None:
    """Bytes that this process has taken of a GPU's memory; None on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(torch.mps.driver_allocated_memory()) if device.type == "mps" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room for a tensor, on a GPU or here. Apple's back end and the CPU's have no type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def no_capacity_is_an_error() -> Iterator[None]:
    """NoRoomError, in one sentence, where torch finds no memory; also a decorator."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise NoRoomError(f"the device has no memory left: {first_line(error)[:120]}") from None

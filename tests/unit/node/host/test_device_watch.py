"""A device on which every batch fails: tried with the host's own token, given up, tried again, taken again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from node.host.availability import Availability
from node.host.device_watch import MAX_FAILED_BATCHES, TRY_AGAIN_S, DeviceWatch
from node.host.serving import batch_runner
from node.host.serving.batch_runner import try_forward
from node.host.serving.runtime import Runtime, RuntimeConfig
from node.model.experts.block import new_block
from protocol.manifest import BlockId
from tests.support.runtime_jobs import MANIFEST, TIMEOUT_S, forward
from tests.support.swarm_parts import CPU

if TYPE_CHECKING:
    import pytest


def no_kernel(*_: object) -> torch.Tensor:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")


class Bench:
    """A host's runtime with one block, and the watch over it."""

    def __init__(self) -> None:
        self.availability, self.reports = Availability(), list[str]()
        self.runtime = Runtime([new_block(MANIFEST, BlockId(0, 0), CPU)], MANIFEST, RuntimeConfig())
        self.watch = DeviceWatch(self.runtime, self.availability, self._try, self._report)
        self.requests = 0

    def _try(self) -> str:
        return try_forward(new_block(MANIFEST, BlockId(0, 0), CPU), MANIFEST.model.d_model, CPU)

    async def _report(self, problem: str) -> None:
        self.reports.append(problem)

    def fail(self, n_batches: int) -> None:
        for _ in range(n_batches):
            self.requests += 1
            job = forward(self.requests, experts=range(4))
            self.runtime.submit(job)
            assert job.future.exception(TIMEOUT_S) is not None


async def test_a_device_that_fails_pauses_the_host_and_one_that_works_again_ends_the_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bench = Bench()
    bench.runtime.start()
    try:
        with monkeypatch.context() as broken:
            broken.setattr(batch_runner, "layer_forward", no_kernel)
            bench.fail(MAX_FAILED_BATCHES - 1)
            await bench.watch.look()
            assert bench.reports == []
            bench.fail(1)
            await bench.watch.look()
            problem = "CUDA error: no kernel image is available for execution on the device"
            assert bench.reports == [problem]
            assert bench.availability.reasons == ("its device fails",)
            assert problem in caplog.text
            await bench.watch.look()
            assert bench.watch.pause_s() == 2 * TRY_AGAIN_S
            assert caplog.text.count("gives its blocks up until it works") == 1
        await bench.watch.look()
        assert bench.reports[-1] == ""
        assert bench.availability.working.is_set()
        assert "The device computes again" in caplog.text
    finally:
        bench.runtime.stop(TIMEOUT_S)


async def test_batches_of_a_peer_that_fail_on_a_good_device_take_nobody_down(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.runtime.start()
    try:
        with monkeypatch.context() as broken:
            broken.setattr(batch_runner, "merged_inputs", no_kernel)
            bench.fail(3 * MAX_FAILED_BATCHES)
            await bench.watch.look()
        assert bench.availability.working.is_set()
        assert not any(bench.reports)
        job = forward(0, experts=range(4))
        bench.runtime.submit(job)
        job.future.result(TIMEOUT_S)
        assert bench.runtime.failed_in_a_row == 0
    finally:
        bench.runtime.stop(TIMEOUT_S)


def test_a_result_that_is_not_finite_is_a_failure_too() -> None:
    block = new_block(MANIFEST, BlockId(0, 0), CPU)
    assert try_forward(block, MANIFEST.model.d_model, CPU) == ""
    for weights in block.params.values():
        weights.fill_(torch.nan)
    assert try_forward(block, MANIFEST.model.d_model, CPU) == "what it computes is not finite"

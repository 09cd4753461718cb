"""An owner's limits: what the flags mean, how debts are paid, what fits into memory and disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from common.errors import ConfigError
from common.sizes import parse_rate, parse_size
from node.host.block_store import BlockStore, block_path, folder_bytes
from node.host.capacity import block_bytes, capacity_for, need_of, wanted_capacity
from node.host.config import HostConfig
from node.limits import memory
from node.limits.config import LimitsConfig
from node.limits.limits import Limits
from node.limits.memory import Capacity, Need, container_limit, fit, limit_around, lowest_limit
from node.limits.process_usage import ProcessUse
from node.limits.rate_limits import CALL_BYTES, CREDIT_S, OVERHEAD, RateLimits, TokenBucket
from node.model.experts.block import new_block
from protocol.manifest import BlockId, all_blocks
from tests.support.swarm_parts import CPU, small_manifest

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = small_manifest()
NEED = Need(block_bytes=10_000_000, batch_token_bytes=10_000, queue_token_bytes=1000)
WANTED = Capacity(max_blocks=8, keep_inputs_bytes=256 << 20, max_batch_tokens=16_384, max_queue_tokens=65_536)


BUSY_CHILD = """
import sys, time
taken = bytearray(64 << 20)
while time.process_time() < 0.1:
    pass
print(len(taken), flush=True)
sys.stdin.read()
"""


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeUse(ProcessUse):
    def __init__(self) -> None:
        super().__init__()
        self.used_s = 50.0

    def cpu_s(self) -> float:
        return self.used_s


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("600MB", 600_000_000), ("2 GB", 2_000_000_000), ("1.5GiB", 3 << 29), ("700b", 700), ("", None)],
)
def test_a_size_is_read_as_people_write_it(text: str, n_bytes: int | None) -> None:
    assert parse_size("--max-memory", text) == n_bytes


@pytest.mark.parametrize("text", ["600", "MB", "-1MB", "1e9B", "600MB/s", "6 00MB", "1XB"])
def test_a_size_that_is_none_names_the_flag_and_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-memory: is .*, must be such as 600MB or 2GB"):
        parse_size("--max-memory", text)


def test_a_rate_ends_in_per_second() -> None:
    assert parse_rate("--max-bandwidth-up", "2MB/s") == 2_000_000
    with pytest.raises(ConfigError, match=r"must be such as 2MB/s or 500KB/s"):
        parse_rate("--max-bandwidth-up", "2MB")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_bandwidth_down": "100KB/s"}, r"--max-bandwidth-down: is '100KB/s', must be 0.5MB/s or more"),
        ({"max_cpu_percent": 1.0}, r"--max-cpu-percent: must be 5 or more, or 0"),
        ({"max_cpu_percent": float("nan")}, r"--max-cpu-percent: must be 5 or more"),
        ({"max_disk": "lots"}, r"--max-disk: is 'lots', must be such as"),
        ({"not_while": ("steam", "")}, r"not_while: '' is no name of a program, such as steam, without its folder"),
        ({"not_while": ("/usr/bin/steam",)}, r"not_while: '/usr/bin/steam' is no name of a program"),
        ({"not_while": ("a\x1b[2J",)}, r"not_while: 'a\\x1b\[2J' is no name of a program"),
        ({"not_while": ("x" * 256,)}, r"not_while: 'x+' is no name of a program"),
        ({"not_while": ("x",) * 65}, r"not_while: names 65 programs, may name 64 at most"),
        ({"not_while_gpu_percent": -1.0}, r"not_while_gpu_percent: must be below 100, or 0 for no limit, is -1"),
        ({"not_while_gpu_percent": 100.0}, r"not_while_gpu_percent: must be below 100"),
        ({"not_while_gpu_percent": float("nan")}, r"not_while_gpu_percent: must be below 100"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Limits.of(LimitsConfig(**changes))


def test_without_flags_there_is_no_limit() -> None:
    assert Limits.of(LimitsConfig()) == Limits()
    assert Limits().told() == {}


def test_what_keeps_a_host_from_working_is_told_with_the_limits() -> None:
    limits = Limits.of(LimitsConfig(on_battery=True, not_while=("steam", "blender"), not_while_gpu_percent=25.0))
    assert limits.told() == {"on_battery": True, "not_while": ("steam", "blender"), "not_while_gpu_percent": 25.0}


def test_a_debt_is_slept_off_after_it_was_made() -> None:
    clock = FakeClock()
    bucket = TokenBucket(100.0, clock)
    assert bucket.take(50) == 0.5
    assert bucket.take(50) == 1.0
    clock.now_s += 0.25
    assert bucket.wait_s() == 0.75


def test_an_idle_bucket_saves_no_more_than_its_credit() -> None:
    clock = FakeClock()
    bucket = TokenBucket(100.0, clock)
    clock.now_s += 3600
    assert bucket.take(100 * CREDIT_S) == 0.0
    assert bucket.take(100) == 1.0


def test_whoever_rests_after_each_piece_keeps_the_rate() -> None:
    clock = FakeClock()
    bucket = TokenBucket(1000.0, clock)
    began_s, n_bytes = clock.now_s, 0
    while clock.now_s - began_s < 60:
        n_bytes += 700
        clock.now_s += 0.01 + bucket.take(700)
    assert n_bytes == pytest.approx(60_000, rel=0.03)


def test_without_a_limit_bytes_are_counted_and_nobody_waits() -> None:
    rate_limits = RateLimits()
    assert rate_limits.sent(10**9) == 0.0
    assert rate_limits.received(CALL_BYTES) == 0.0
    assert rate_limits.sent_bytes == round(10**9 * OVERHEAD)
    assert rate_limits.received_bytes == round(CALL_BYTES * OVERHEAD)


def test_processor_time_of_any_part_of_the_node_makes_all_of_it_rest() -> None:
    clock, use = FakeClock(), FakeUse()
    rate_limits = RateLimits(Limits(cpu_percent=20.0), use, clock)
    assert rate_limits.rest_s() == 0.0
    use.used_s += 0.5
    assert rate_limits.rest_s() == pytest.approx(2.5)
    assert rate_limits.sent(100) == pytest.approx(2.5)
    clock.now_s += 2.5
    assert rate_limits.rest_s() == pytest.approx(0.0)


def test_a_process_knows_its_own_time_and_memory() -> None:
    use = ProcessUse()
    before_s = use.cpu_s()
    until_s = time.process_time() + 0.02
    while time.process_time() < until_s:
        pass
    assert use.cpu_s() - before_s >= 0.02
    kept = bytearray(os.urandom(1 << 20)) * 64
    assert use.memory_bytes() > len(kept)


def test_a_child_counts_too_and_its_end_is_no_error() -> None:
    child = subprocess.Popen((sys.executable, "-c", BUSY_CHILD), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin
    assert child.stdout
    with child, child.stdin, child.stdout:
        assert child.stdout.readline()
        alone, use = ProcessUse(), ProcessUse(child.pid)
        assert use.cpu_s() - alone.cpu_s() > 0.05
        assert use.memory_bytes() - alone.memory_bytes() > 32 << 20
        assert use.child_io().written > 0
    assert use.child_io() == (0, 0)
    assert use.memory_bytes() > 0


def test_what_fits_is_lowered_until_it_does() -> None:
    capacity = fit(WANTED, 600_000_000, 300_000_000, NEED, "--max-memory")
    assert capacity == Capacity(
        max_blocks=8, keep_inputs_bytes=32_500_000, max_batch_tokens=5200, max_queue_tokens=45_500, max_calls=11
    )
    total = 8 * NEED.block_bytes + capacity.keep_inputs_bytes + capacity.max_batch_tokens * NEED.batch_token_bytes
    assert 300_000_000 + total + capacity.max_queue_tokens * NEED.queue_token_bytes < 600_000_000


def test_where_memory_is_short_there_are_fewer_blocks() -> None:
    assert fit(WANTED, 480_000_000, 300_000_000, NEED, "--max-memory").max_blocks == 2
    assert fit(WANTED, None, 300_000_000, NEED, "--max-memory") == WANTED


def test_too_little_for_one_block_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"--max-memory: 400 MB, .* takes 300 MB before .* needs 460 MB"):
        fit(WANTED, 400_000_000, 300_000_000, NEED, "--max-memory")


def test_the_containers_limit_holds_where_it_is_lower(tmp_path: Path) -> None:
    group, own = tmp_path / "cgroup", tmp_path / "own"
    (group / "a" / "b").mkdir(parents=True)
    own.write_text("0::/a/b\n")
    (group / "a" / "b" / "memory.max").write_text("max\n")
    assert container_limit(group, own) is None
    (group / "a" / "memory.max").write_text("500000000\n")
    assert container_limit(group, own) == 500_000_000
    (group / "memory.max").write_text("400000000\n")
    assert container_limit(group, own) == 400_000_000
    assert lowest_limit(600_000_000, 400_000_000) == 400_000_000
    assert lowest_limit(None, None) is None


def test_an_owner_who_sets_no_limit_gives_half_of_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8_000_000_000))
    monkeypatch.setattr(memory, "container_limit", lambda: None)
    assert limit_around(None) == 4_000_000_000
    assert limit_around(6_000_000_000) is None
    monkeypatch.setattr(memory, "container_limit", lambda: 1_000_000_000)
    assert limit_around(None) == limit_around(6_000_000_000) == 1_000_000_000


def test_a_machine_without_control_groups_has_no_such_limit(tmp_path: Path) -> None:
    assert container_limit(tmp_path / "none", tmp_path / "none") is None


def test_a_blocks_bytes_are_those_of_its_tensors() -> None:
    block = new_block(MANIFEST, BlockId(0, 0), CPU)
    tensors = (*block.params.values(), *block.adam.first.values(), *block.adam.second.values())
    assert block_bytes(MANIFEST) == sum(t.numel() * t.itemsize for t in tensors)
    assert need_of(MANIFEST).block_bytes == block_bytes(MANIFEST)


def test_a_small_disk_means_few_blocks() -> None:
    wanted = wanted_capacity(HostConfig(), 8)
    limits = Limits(disk_bytes=7 * block_bytes(MANIFEST))
    assert capacity_for(wanted, limits, MANIFEST, CPU, 0, None) == wanted.with_blocks(2)
    with pytest.raises(ConfigError, match=r"--max-disk: is too little for one block"):
        capacity_for(wanted, replace(limits, disk_bytes=block_bytes(MANIFEST)), MANIFEST, CPU, 0, None)


def test_a_gpus_limit_counts_only_on_a_gpu() -> None:
    wanted, limits = wanted_capacity(HostConfig(), 8), Limits(gpu_memory_bytes=1)
    assert capacity_for(wanted, limits, MANIFEST, CPU, 0, None) == wanted
    with pytest.raises(ConfigError, match=r"--max-gpu-memory"):
        capacity_for(wanted, limits, MANIFEST, torch.device("cuda"), 0, None)


def test_checkpoints_written_longest_ago_make_room_and_hosted_ones_stay(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, MANIFEST, CPU)
    ids = all_blocks(MANIFEST.model)[:4]
    for age, block_id in enumerate(ids):
        store.write(block_id, *store.copy(new_block(MANIFEST, block_id, CPU)))
        os.utime(block_path(tmp_path, block_id), (age, age))
    size = folder_bytes(tmp_path) // len(ids)
    assert store.trim(2 * size + size // 2, kept=[ids[0]]) == [ids[1], ids[2]]
    assert set(store.versions()) == {ids[0], ids[3]}
    assert store.trim(0, kept=[ids[0]]) == [ids[3]]
    assert set(store.versions()) == {ids[0]}


def test_nothing_that_can_wait_is_begun_before_every_debt_is_paid() -> None:
    clock, use = FakeClock(), FakeUse()
    rate_limits = RateLimits(Limits(cpu_percent=50.0, up_bytes_per_s=1_000_000), use, clock)
    assert rate_limits.owed_s() == 0.0
    rate_limits.sent(2_000_000)
    assert rate_limits.owed_s() == pytest.approx(2 * OVERHEAD)
    use.used_s += 5.0
    assert rate_limits.owed_s() == pytest.approx(10.0)


def test_a_rate_that_changes_holds_from_then_on_for_what_is_not_paid_yet() -> None:
    clock = FakeClock()
    bucket = TokenBucket(100.0, clock)
    assert bucket.take(300.0) == pytest.approx(3.0)
    clock.now_s += 1.0
    bucket.refill_at(400.0)
    assert bucket.wait_s() == pytest.approx(0.5), "200 at 400 a second"
    bucket.refill_at(None)
    assert bucket.take(1e9) == 0.0
    bucket.refill_at(100.0)
    assert bucket.take(100.0) == pytest.approx(1.0), "what was taken without a limit is not paid for later"


def test_limits_that_change_are_followed_by_every_rate() -> None:
    clock, use = FakeClock(), FakeUse()
    limited = RateLimits(Limits(), use, clock)
    assert (limited.slows_downloads, limited.sent(10**9)) == (False, 0.0)
    limited.follow(Limits(up_bytes_per_s=1_000_000, down_bytes_per_s=2_000_000, cpu_percent=50.0))
    assert limited.slows_downloads
    assert limited.sent(1_000_000) == pytest.approx(OVERHEAD)
    use.used_s += 2.0
    assert limited.rest_s() == pytest.approx(4.0)
    limited.follow(Limits(up_bytes_per_s=1_000_000))
    assert (limited.slows_downloads, limited.rest_s()) == (False, 0.0)

"""Credit on a host as a whole: how much of the disk it takes, and that a disk which fails does not end the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from node.credit.answered import AnsweredPairs, PairCounts
from node.credit.store import MAX_RECEIPTS
from node.host.config import HostConfig
from node.host.credit.host_credit import HostCredit, receipts_kept
from node.limits.limits import Limits
from tests.support.crediting import HOST, NOW_S, RUN, TRAINER

if TYPE_CHECKING:
    from pathlib import Path

    from node.membership.swarm import Swarm


def host_credit(folder: Path, answered: AnsweredPairs) -> HostCredit:
    parts = SimpleNamespace(
        manifest=SimpleNamespace(run_id=RUN), identity=HOST, dht=SimpleNamespace(now_s=lambda: float(NOW_S))
    )
    return HostCredit(HostConfig(state=folder), Limits(), cast("Swarm", parts), answered)


@pytest.mark.parametrize(
    ("disk_bytes", "receipts"), [(None, MAX_RECEIPTS), (100_000_000, 9765), (10**12, MAX_RECEIPTS)]
)
def test_receipts_take_a_twentieth_of_the_disk_that_an_owner_allows(disk_bytes: int | None, receipts: int) -> None:
    assert receipts_kept(Limits(disk_bytes=disk_bytes)) == receipts


async def test_what_was_counted_is_saved_at_the_end_and_there_at_the_next_start(tmp_path: Path) -> None:
    for expected in (PairCounts(2, 1), PairCounts(4, 2)):
        answered = AnsweredPairs()
        credit = host_credit(tmp_path, answered)
        await credit.open()
        answered.add(TRAINER.peer_id, PairCounts(2, 1))
        assert credit.accounts.total() == expected
        await credit.close()
        await credit.close()


async def test_a_disk_that_fails_is_warned_of_and_the_host_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "credit").write_text("no folder")
    answered = AnsweredPairs()
    credit = host_credit(tmp_path, answered)
    await credit.open()
    answered.add(TRAINER.peer_id, PairCounts(2, 1))
    await credit.close()
    warned = [record.message for record in caplog.records]
    assert len(warned) == 1
    assert warned[0].startswith("What this host answers is not counted now: ")

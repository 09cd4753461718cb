"""Credit on a trainer as a whole: nothing where calls are not signed, and training goes on where a disk fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from node.credit.answered import AnsweredPairs, PairCounts
from node.trainer.config import TrainConfig
from node.trainer.credit.trainer_credit import TrainerCredit
from protocol.endpoints import Address
from tests.support.crediting import HOST, NOW_S, RUN, STRANGER, TRAINER

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from node.membership.swarm import Swarm
    from node.trainer.dispatch.dispatcher import Dispatcher

PEERS = (
    SimpleNamespace(peer_id=HOST.peer_id, endpoint="192.0.2.1:4000", role="host"),
    SimpleNamespace(peer_id=STRANGER.peer_id, endpoint="192.0.2.2:4000", role="trainer"),
    SimpleNamespace(peer_id=TRAINER.peer_id, endpoint="", role="host"),
)


def trainer_credit(folder: Path, answered: AnsweredPairs, *, insecure_local: bool = False) -> TrainerCredit:
    parts = SimpleNamespace(
        manifest=SimpleNamespace(run_id=RUN),
        identity=TRAINER,
        security=SimpleNamespace(insecure_local=insecure_local),
        directory=SimpleNamespace(peers=lambda: PEERS),
        dht=SimpleNamespace(now_s=lambda: float(NOW_S)),
    )
    dispatcher = SimpleNamespace(answered=answered, client=SimpleNamespace(channels=None))
    return TrainerCredit(TrainConfig(out=folder), cast("Swarm", parts), cast("Dispatcher", dispatcher))


async def test_nothing_is_claimed_where_calls_are_not_signed(tmp_path: Path) -> None:
    answered = AnsweredPairs()
    credit = trainer_credit(tmp_path, answered, insecure_local=True)
    await credit.open()
    answered.add("a host without a key", PairCounts(1, 1))
    await credit._round(1.0)
    assert credit._claims.waiting() == {}
    await credit.finish(1.0)


async def test_hosts_that_can_be_called_are_asked(tmp_path: Path) -> None:
    assert trainer_credit(tmp_path, AnsweredPairs())._addresses() == {
        HOST.peer_id: Address(HOST.peer_id, "192.0.2.1:4000")
    }


async def test_a_disk_that_fails_is_warned_of_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "credit").write_text("no folder")
    answered = AnsweredPairs()
    credit = trainer_credit(tmp_path, answered)
    await credit.open()
    answered.add(HOST.peer_id, PairCounts(1, 1))
    await credit.finish(1.0)
    warned = [record.message for record in caplog.records]
    assert len(warned) == 1
    assert warned[0].startswith("What hosts answer earns them nothing now: ")

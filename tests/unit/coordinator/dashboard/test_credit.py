"""Credit on the page: what a ledger comes to that somebody else fills, in pages, and as files."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError
from coordinator.credit.ledger import LEDGER_FILE
from coordinator.credit.sums import CreditSums, HostSum
from coordinator.dashboard import answers
from coordinator.dashboard.credit import CreditWatch
from protocol.profile import Profile
from protocol.receipts import pairs_per_token
from tests.support.crediting import HOST, RUN, TRAINER, minutes
from tests.support.dashboard import page_server
from tests.support.ledgers import both, ledger_in, take
from tests.support.run_views import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coordinator.credit.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Three receipts of 2,000 forward and 1,000 backward pairs, of a host with a name."""
    with ledger_in(tmp_path / "credit", both(), MANIFEST.run_id) as made:
        take(made, minutes(3))
        made.name(HOST.peer_id, Profile(name="Ada", team="Analysts"))
        yield made


@pytest.mark.usefixtures("ledger")
async def test_what_was_collected_is_shown_with_names(tmp_path: Path) -> None:
    async with page_server(tmp_path, credit_in=tmp_path / "credit") as server, server.client() as client:
        kinds = ("hosts", "trainers", "teams")
        told = {kind: (await client.get(f"/api/credit?kind={kind}")).json() for kind in kinds}
    assert {(of["total"], of["problem"], of["unseen_receipts"]) for of in told.values()} == {(1, "", 0)}
    (host,), (trainer,), (team,) = (told[kind]["rows"] for kind in kinds)
    assert (host["rank"], host["peer_id"], host["name"], host["team"]) == (1, HOST.peer_id, "Ada", "Analysts")
    assert (host["forward_pairs"], host["backward_pairs"], host["receipts"]) == (6000, 3000, 3)
    assert (trainer["peer_id"], trainer["capped"]) == (TRAINER.peer_id, False)
    assert trainer["tokens_learnt"] == 3000 // pairs_per_token(MANIFEST.model)
    assert (team["team"], team["peers"], team["forward_pairs"]) == ("Analysts", 1, 6000)


async def test_what_comes_later_is_shown_at_the_next_look_while_others_write(tmp_path: Path, ledger: Ledger) -> None:
    watch = CreditWatch(tmp_path / "credit", MANIFEST)
    await watch.look()
    take(ledger, minutes(5))
    assert watch.sums.hosts[0].receipts == 3
    with ledger.reading():
        await watch.look()
    assert watch.sums.hosts[0].receipts == 5


@pytest.mark.usefixtures("ledger")
async def test_all_of_it_can_be_saved(tmp_path: Path) -> None:
    async with page_server(tmp_path, credit_in=tmp_path / "credit") as server, server.client() as client:
        table, programs = await client.get("/api/credit.csv"), await client.get("/api/credit.json")
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [(row["role"], row["peer_id"], row["name"]) for row in rows] == [
        ("host", HOST.peer_id, "Ada"),
        ("trainer", TRAINER.peer_id, ""),
    ]
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    assert programs.json()["hosts"][0]["forward_pairs"] == 6000


async def test_without_a_folder_or_before_anything_was_collected_the_page_says_so(tmp_path: Path) -> None:
    async with page_server(tmp_path) as server, server.client() as client:
        told = (await client.get("/api/credit")).json()
    assert (told["total"], told["problem"]) == (0, "No credit is shown here: start the dashboard with --credit FOLDER.")
    watch = CreditWatch(tmp_path / "nothing", MANIFEST)
    await watch.look()
    assert watch.problem == f"Nothing was collected yet in {tmp_path / 'nothing'}."
    assert not (tmp_path / "nothing").exists()


async def test_another_runs_credit_is_refused(tmp_path: Path) -> None:
    with ledger_in(tmp_path):
        pass
    with pytest.raises(ConfigError, match=f"holds what was collected of run {RUN}; name another folder"):
        await CreditWatch(tmp_path, MANIFEST).look()


async def test_a_ledger_that_cannot_be_read_is_told_and_what_was_read_stays(tmp_path: Path, ledger: Ledger) -> None:
    watch = CreditWatch(tmp_path / "credit", MANIFEST)
    await watch.look()
    ledger.close()
    for path in (tmp_path / "credit").iterdir():
        path.unlink()
    (tmp_path / "credit" / LEDGER_FILE).mkdir()
    await watch.look()
    assert "unable to open database file" in watch.problem
    assert watch.sums.hosts[0].receipts == 3


def test_a_page_of_ten_thousand_hosts_is_small() -> None:
    watch = CreditWatch(None, MANIFEST)
    host = HostSum(
        peer_id=HOST.peer_id, name="n" * 40, team="t" * 40, forward_pairs=1 << 60, backward_pairs=1 << 60, receipts=9
    )
    watch.sums = CreditSums(run_id=RUN, hosts=(host,) * 10_000, trainers=(), teams=(), unseen_receipts=0)
    last = answers.credit(watch, "hosts", 1 << 30)
    assert (last["page"], last["pages"], last["rows"][-1]["rank"]) == (200, 200, 10_000)
    assert len(answers.encoded(last)) < 32_000

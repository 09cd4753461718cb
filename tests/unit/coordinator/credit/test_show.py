"""Sums as tables, CSV and JSON: numbers for all, and names that can do no harm wherever they are read."""

from __future__ import annotations

import csv
import io
import json

from rich.console import Console

from coordinator.credit.show import MAX_SHOWN, render_sums, sums_csv, sums_json
from coordinator.credit.sums import CreditSums, HostSum, TeamSum, TrainerSum
from tests.support.crediting import HOST, RUN, TRAINER

HOST_SUM = HostSum(
    peer_id=HOST.peer_id, name="Ada [bold]", team="=1+1", forward_pairs=12_000, backward_pairs=6_000, receipts=3
)
TRAINER_SUM = TrainerSum(
    peer_id=TRAINER.peer_id, name="", team="", tokens_learnt=600, own_tokens=500, receipts=3, capped=True
)
TEAM_SUM = TeamSum(team="=1+1", peers=1, forward_pairs=12_000, backward_pairs=6_000, tokens_learnt=0)
SUMS = CreditSums(run_id=RUN, hosts=(HOST_SUM,), trainers=(TRAINER_SUM,), teams=(TEAM_SUM,), unseen_receipts=4)
NOTHING = CreditSums(run_id=RUN, hosts=(), trainers=(), teams=(), unseen_receipts=0)


def shown(sums: CreditSums) -> str:
    console = Console(width=120, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(render_sums(sums))
    return capture.get()


def test_the_tables_have_who_earned_what_and_what_does_not_count_yet() -> None:
    text = shown(SUMS)
    for words in (f"run {RUN}", HOST.peer_id[-6:], "Ada [bold]", "12,000", "6,000", TRAINER.peer_id[-6:], "600", "500"):
        assert words in text
    assert "in red: its receipts come to more tokens than it has announced" in text
    assert "4 receipts are of peers that were not seen in the run" in text


def test_a_run_without_receipts_says_so() -> None:
    assert "nobody has earned anything yet" in shown(NOTHING)
    assert sums_csv(NOTHING).count("\n") == 1


def test_a_long_table_is_cut_and_says_where_the_rest_is() -> None:
    many = CreditSums(run_id=RUN, hosts=(HOST_SUM,) * (MAX_SHOWN + 5), trainers=(), teams=(), unseen_receipts=0)
    assert "and 5 more peers, which the files of --csv and --json have" in shown(many)
    assert len(sums_csv(many).splitlines()) == MAX_SHOWN + 6


def test_the_csv_has_a_line_for_each_peer_and_no_formula() -> None:
    host, trainer = csv.DictReader(io.StringIO(sums_csv(SUMS)))
    assert (host["role"], host["peer_id"], host["forward_pairs"]) == ("host", HOST.peer_id, "12000")
    assert (host["name"], host["team"], host["tokens_learnt"]) == ("Ada [bold]", "'=1+1", "")
    assert (trainer["role"], trainer["tokens_learnt"], trainer["own_tokens"]) == ("trainer", "600", "500")
    assert (trainer["capped"], trainer["forward_pairs"]) == ("True", "")


def test_the_json_has_all_of_it() -> None:
    read = json.loads(sums_json(SUMS))
    assert read["run_id"] == RUN
    assert read["hosts"] == [vars(HOST_SUM)]
    assert read["trainers"] == [vars(TRAINER_SUM)]
    assert read["teams"] == [vars(TEAM_SUM)]
    assert read["unseen_receipts"] == 4

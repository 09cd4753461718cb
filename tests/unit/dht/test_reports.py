"""Trainers' reports in the DHT: announced beside the rest, looked for only by those who show them, and never many."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from common.errors import RecordError
from dht.directory import Directory
from dht.packing import MAX_REPORTING, RecordChecker, carried, check_capacity
from dht.record_store import Entry
from dht.record_versions import TTL_S
from protocol.identity import Identity
from protocol.manifest import TRUNK
from protocol.records import peers_key, reports_key, sign_record
from protocol.reports import TrainerReport, encode_report
from tests.support.announcing import FIRST, MODEL, RUN, Host
from tests.support.dht_nodes import entry_by
from tests.support.fake_dht import FakeDht

REPORT = TrainerReport(step=3, run_tokens=30, train_bits_per_byte=3.5)


@pytest.fixture
def dht() -> FakeDht:
    return FakeDht()


@pytest.fixture
def directory(dht: FakeDht) -> Directory:
    return Directory(dht, RUN, MODEL, with_reports=True)


async def test_what_a_trainer_measured_is_found_under_its_name_and_expires(dht: FakeDht, directory: Directory) -> None:
    trainer = Host(dht, TRUNK)
    trainer.report = REPORT
    assert await trainer.announcer.announce_now()
    await directory.refresh_now()
    (found,) = directory.snapshot().reports
    assert (found.peer_id, found.said) == (trainer.peer_id, REPORT)
    dht.time_s += TTL_S + 0.1
    assert directory.snapshot().reports == ()


async def test_a_newer_report_takes_the_place_of_the_one_before_and_leaves_with_its_trainer(
    dht: FakeDht, directory: Directory
) -> None:
    trainer = Host(dht, TRUNK)
    for trainer.report in (REPORT, replace(REPORT, step=4)):
        await trainer.announcer.announce_now()
        await directory.refresh_now()
    assert [found.said.step for found in directory.snapshot().reports] == [4]
    await trainer.announcer.withdraw()
    await directory.refresh_now()
    assert directory.snapshot().reports == ()


async def test_who_has_nothing_to_report_announces_nothing_of_the_kind(dht: FakeDht) -> None:
    await Host(dht, FIRST).announcer.announce_now()
    assert reports_key(RUN) not in dht.stored


async def test_reports_are_looked_for_only_by_who_asks_for_them(dht: FakeDht) -> None:
    trainer = Host(dht, TRUNK)
    trainer.report = REPORT
    await trainer.announcer.announce_now()
    asked: list[str] = []
    look_up = dht.get_many

    async def get_many(keys: list[str]) -> dict[str, dict[str, bytes]]:
        asked.extend(keys)
        return await look_up(keys)

    dht.get_many = get_many  # type: ignore[method-assign, assignment]
    plain = Directory(dht, RUN, MODEL)
    await plain.refresh_now()
    assert peers_key(RUN) in asked
    assert reports_key(RUN) not in asked
    assert plain.snapshot().reports == ()


async def test_a_report_moves_no_generation(dht: FakeDht, directory: Directory) -> None:
    trainer = Host(dht, TRUNK)
    await trainer.announcer.announce_now()
    await directory.refresh_now()
    before = directory.generation
    trainer.report = REPORT
    await trainer.announcer.announce_now()
    await directory.refresh_now()
    assert directory.snapshot().reports
    assert directory.generation == before


def report_entry(owner: Identity) -> Entry:
    key, expiration_s = reports_key(RUN), time.time() + 30.0
    raw = sign_record(owner, key=key, version=1, expiration_s=expiration_s, payload=encode_report(REPORT))
    return Entry(key, owner.peer_id, raw, expiration_s)


def test_fewer_owners_have_a_place_under_reports_than_under_other_keys() -> None:
    owner = Identity.generate()
    report = RecordChecker(time.time).check(carried(report_entry(owner)))
    peer = RecordChecker(time.time).check(carried(entry_by(owner)))
    others = [f"peer-{number}" for number in range(MAX_REPORTING)]
    check_capacity(2, others[1:], report)
    check_capacity(2, [*others[1:], owner.peer_id], report)
    check_capacity(2, others, peer)
    with pytest.raises(RecordError, match=r"store: full \(256 owners under one key\)"):
        check_capacity(2, others, report)

"""python -m tests.benchmarks.receipts --json runs/bench/receipts.json

What it takes to add a million receipts up, of 100 hosts for 10 trainers, page by page as they are collected: against
the same rows in a table of SQLite without any check, and the memory that it takes. Beside it, how many receipts are
checked in a second, against their two signatures alone. Medians of runs that take turns.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import tyro

from coordinator.credit.ledger import Checked, Ledger
from coordinator.credit.members import RunMember
from coordinator.credit.sums import read_sums
from protocol import receipts_pb2 as pb
from protocol.endpoints import Address
from protocol.identity import Identity, peer_id_of, verify
from protocol.manifest import ModelConfig
from protocol.receipts import MAX_PAGE_RECEIPTS, Receipt, countersign, open_receipt, sign_receipt
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare, not_compared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

RUN_ID = "bench-0123456789abcdef0123456789abcdef"
N_RECEIPTS, N_HOSTS, N_TRAINERS = 1_000_000, 100, 10
N_CHECKED = 2000
START_S = 1_800_000_000
STORE = bytes(16)
OURS, PLAIN = "in a ledger", "in a plain table"
CHECKED, SIGNATURES = "checked", "two signatures alone"
SPEED, MEMORY, CHECKS = "receipts/s, added up", "MB beyond the start, at most", "receipts/s, checked"
NOTES = (
    f"{N_HOSTS} hosts, {N_TRAINERS} trainers, a receipt each minute for each pair, in pages of {MAX_PAGE_RECEIPTS}",
    "the files lie in the folder for temporary files; sums of all peers are read at the end",
)


@dataclass(frozen=True, kw_only=True)
class ReceiptsBenchmark(RunsConfig):
    """Receipts per second, and their memory."""

    receipts: int = N_RECEIPTS
    """How many."""


def main(config: ReceiptsBenchmark) -> None:
    """Measure, write, print."""
    memory: list[float] = []
    contenders: dict[str, Callable[[], float]] = {
        OURS: timed(config.receipts, in_ledger, memory),
        PLAIN: timed(config.receipts, in_plain_table, []),
        CHECKED: checks(open_receipt),
        SIGNATURES: checks(two_signatures),
    }
    figures = alternate(contenders, config.runs, Teller())
    config.publish("receipts", rows_of(figures, memory, config.receipts), NOTES)


def key(kind: str, number: int) -> bytes:
    """A key that nobody has the private part of."""
    return hashlib.sha256(f"{kind} {number}".encode()).digest()


def pages(n_receipts: int) -> Iterator[tuple[bytes, list[Checked]]]:
    """A host's key and a page of its receipts, again and again: minutes in their order, as hosts keep them."""
    each = n_receipts // N_HOSTS
    trainers = [key("trainer", number) for number in range(N_TRAINERS)]
    for number in range(N_HOSTS):
        host = key("host", number)
        receipts = (receipt(host, trainers[n % N_TRAINERS], n // N_TRAINERS) for n in range(each))
        while page := list(islice(receipts, MAX_PAGE_RECEIPTS)):
            yield host, page


def receipt(host: bytes, trainer: bytes, minute: int) -> Checked:
    """That of a pair for one minute."""
    start_s = START_S + 60 * minute
    digest = hashlib.sha256(host + trainer + start_s.to_bytes(8, "big")).digest()
    made = Receipt(
        run_id=RUN_ID,
        host=host,
        trainer=trainer,
        start_s=start_s,
        end_s=start_s + 60,
        forward_pairs=2000,
        backward_pairs=1000,
        nonce=digest[:16],
    )
    return Checked(made, digest)


def members() -> Iterator[RunMember]:
    """All of them, as they announce themselves."""
    for number in range(N_HOSTS):
        yield RunMember(Address(peer_id_of(key("host", number)), ""), "host", 0)
    for number in range(N_TRAINERS):
        yield RunMember(Address(peer_id_of(key("trainer", number)), ""), "trainer", 1 << 50)


def in_ledger(folder: Path, n_receipts: int, on_page: Callable[[], None]) -> int:
    """The backward pairs of all hosts, by a ledger."""
    with closing(Ledger(folder, RUN_ID)) as ledger:
        ledger.open()
        ledger.see(members())
        for place, (host, page) in enumerate(pages(n_receipts)):
            ledger.take(page, peer_id_of(host), STORE, place)
            on_page()
        sums = read_sums(ledger, RUN_ID, ModelConfig())
    return sum(host.backward_pairs for host in sums.hosts)


def in_plain_table(folder: Path, n_receipts: int, on_page: Callable[[], None]) -> int:
    """The same by rows in the order in which they come, which SQLite adds up."""
    with closing(sqlite3.connect(folder / "plain.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("CREATE TABLE receipts (host, trainer, start_s, nonce, digest, end_s, forward, backward)")
        for _, page in pages(n_receipts):
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", map(plain_row, page))
            connection.execute("COMMIT")
            on_page()
        total: int = connection.execute("SELECT sum(backward) FROM receipts").fetchone()[0]
    return total


def plain_row(one: Checked) -> tuple[bytes | int, ...]:
    """All of a receipt."""
    r = one.receipt
    times = (r.start_s, r.nonce, one.digest, r.end_s)
    return (r.host, r.trainer, *times, r.forward_pairs, r.backward_pairs)


def timed(
    n_receipts: int, add_up: Callable[[Path, int, Callable[[], None]], int], memory: list[float]
) -> Callable[[], float]:
    """Receipts per second; `memory` gets the MB by which the process has grown at most."""

    def run() -> float:
        process = psutil.Process()
        before, most = process.memory_info().rss, 0

        def look() -> None:
            nonlocal most
            most = max(most, process.memory_info().rss - before)

        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            total = add_up(Path(folder), n_receipts, look)
            seconds = time.perf_counter() - started
        expected = 1000 * N_HOSTS * (n_receipts // N_HOSTS)
        if total != expected:
            raise SystemExit(f"the receipts add up to {total} backward pairs, not to {expected}")
        memory.append(most / 1e6)
        return n_receipts / seconds

    return run


def checks(check: Callable[[pb.SignedReceipt], object]) -> Callable[[], float]:
    """Receipts per second of `check`."""
    host, trainer = Identity.generate(), Identity.generate()
    made = (receipt(host.public_key, trainer.public_key, minute).receipt for minute in range(N_CHECKED))
    messages = [sign_receipt(trainer, one) for one in made]
    for message in messages:
        message.host_signature = countersign(host, message)

    def run() -> float:
        started = time.perf_counter()
        for message in messages:
            check(message)
        return N_CHECKED / (time.perf_counter() - started)

    return run


def two_signatures(message: pb.SignedReceipt) -> None:
    """Nothing but the signatures."""
    said = pb.Receipt.FromString(message.receipt)
    verify(said.trainer, b"receipt/1", message.receipt, message.trainer_signature)
    verify(said.host, b"receipt-host/1", message.trainer_signature + message.receipt, message.host_signature)


def rows_of(figures: Mapping[str, Sequence[float]], memory: Sequence[float], n_receipts: int) -> list[Row]:
    """Speed and memory of adding up, and speed of checking. The warm-up's memory, the first, does not count."""
    case = f"{n_receipts:,} receipts"
    return [
        compare(case, SPEED, figures[OURS], PLAIN, figures[PLAIN]),
        not_compared(case, MEMORY, memory[1:], "-", "only told"),
        compare(f"{N_CHECKED:,} receipts", CHECKS, figures[CHECKED], SIGNATURES, figures[SIGNATURES]),
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(ReceiptsBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)

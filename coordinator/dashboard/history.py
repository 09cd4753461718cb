"""What a run was like, in one SQLite file: a bounded number of rows, finer for the last hour than for the last month.

Every row holds all figures at one time. A step of time has one row, which takes in each sample that falls into it.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

FILE: Final = "history.sqlite"
FORMAT: Final = 1
PAGE_BYTES: Final = 4096
BUSY_S: Final = 5.0
MAX_POINTS: Final = 400
"""Points of a curve that a page is given."""
MAX_EVALUATIONS: Final = 2000
"""Evaluations that are kept; of more than so many every second one is forgotten."""
HOUR_S, DAY_S = 3600, 86_400


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Rows that are `step_s` apart, for the last `keep_s` seconds."""

    step_s: int
    keep_s: int


TIERS: Final = (
    Tier(step_s=10, keep_s=HOUR_S),
    Tier(step_s=60, keep_s=DAY_S),
    Tier(step_s=600, keep_s=60 * DAY_S),
)
SPANS: Final = {"hour": HOUR_S, "day": DAY_S, "week": 7 * DAY_S, "all": 60 * DAY_S}
"""How far back a page may look, in seconds, by name."""

COUNTED: Final = (
    "hosts",
    "trainers",
    "coordinators",
    "lighthouses",
    "silent",
    "experts_alive",
    "blocks_lost",
    "replicas_mean",
    "run_tokens",
    "held_out_bits_per_byte",
    "calls_ok",
    "calls_failed",
    "wire_bytes",
    "exchanged_bytes",
)
"""Figures of which a step of time keeps the latest."""

AVERAGED: Final = (
    "tokens_per_s",
    "answered_tokens_per_s",
    "queue_tokens",
    "train_bits_per_byte",
    "load_entropy_bits",
    "load_cv",
    "dead_experts",
    "staleness",
    "version_gap",
    "divergence",
    "trunk_divergence",
)
"""Figures of which a step of time keeps the mean."""

COLUMNS: Final = (*COUNTED, *AVERAGED)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Figures by name, each with a value or None for each of the times `t_s`, which grow."""

    t_s: tuple[int, ...]
    figures: Mapping[str, tuple[float | None, ...]]


class RunHistory:
    """The file of one run. Belongs to one thread; what is committed survives a crash of the process."""

    def __init__(self, path: Path, run_id: str, max_bytes: int) -> None:
        """Open the file, made where it is missing, of at most `max_bytes`.

        Raises:
            ConfigError: it is another run's, no history, or cannot be opened.
        """
        self._path = path
        try:
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        except sqlite3.Error as error:
            raise ConfigError(f"{path}: cannot be opened: {error}") from None
        try:
            self._prepare(run_id, max_bytes)
        except sqlite3.Error as error:
            self._db.close()
            raise ConfigError(f"{path}: is no history of a run ({error}); move it away to begin anew") from None
        except ConfigError:
            self._db.close()
            raise

    def close(self) -> None:
        """Fold the log of latest writes into the file."""
        self._db.close()

    def add(self, t_s: float, sample: Mapping[str, float | None], evaluations: Iterable[tuple[int, float]]) -> None:
        """Take in a sample of COLUMNS at `t_s`, and evaluations as tokens of the run and held-out bits per byte.

        Raises:
            CheckpointError: the disk, or the file as far as it may grow, is full, or cannot be written.
        """
        values = [sample[name] for name in COLUMNS]
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                for tier in TIERS:
                    self._db.execute(_UPSERT, (tier.step_s, int(t_s) // tier.step_s * tier.step_s, *values))
                    self._db.execute(_FORGET, (tier.step_s, t_s - tier.keep_s, t_s + tier.step_s))
                self._db.executemany("INSERT OR IGNORE INTO evaluations VALUES (?, ?)", evaluations)
                (count,) = self._db.execute("SELECT COUNT(*) FROM evaluations").fetchone()
                if count > MAX_EVALUATIONS:
                    self._db.execute(_THIN_EVALUATIONS)
        except sqlite3.Error as error:
            raise CheckpointError(f"{self._path}: cannot be written: {error}") from None

    def curves(self, span_s: int, now_s: float) -> Curves:
        """What is kept of the last `span_s` seconds, in at most MAX_POINTS points. Raises CheckpointError."""
        tier = next((tier for tier in TIERS if tier.keep_s >= span_s), TIERS[-1])
        since_s = now_s - span_s
        try:
            (first_s,) = self._db.execute(_FIRST, (tier.step_s, since_s)).fetchone()
            if first_s is None:
                return Curves(t_s=(), figures=dict.fromkeys(COLUMNS, ()))
            rows = self._db.execute(_CURVES, (_bucket_s(tier, now_s - first_s), tier.step_s, since_s)).fetchall()
        except sqlite3.Error as error:
            raise CheckpointError(f"{self._path}: cannot be read: {error}") from None
        return _curves(rows)

    def evaluations(self) -> list[tuple[int, float]]:
        """Tokens of the run, growing, and held-out bits per byte, at most MAX_POINTS. Raises CheckpointError."""
        try:
            rows = self._db.execute("SELECT tokens, bits_per_byte FROM evaluations ORDER BY tokens").fetchall()
        except sqlite3.Error as error:
            raise CheckpointError(f"{self._path}: cannot be read: {error}") from None
        every = -(-len(rows) // (MAX_POINTS - 1)) or 1
        return [*rows[:-1:every], *rows[-1:]]

    def _prepare(self, run_id: str, max_bytes: int) -> None:
        self._db.execute(f"PRAGMA max_page_count = {max(1, max_bytes // PAGE_BYTES)}")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last seconds, not the file
        self._db.execute(f"PRAGMA journal_size_limit = {1 << 20}")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._create(run_id)
        elif version != FORMAT:
            raise ConfigError(f"{self._path}: is of format {version}, this kilohive reads {FORMAT}; move it away")
        (found,) = self._db.execute("SELECT run_id FROM run").fetchone()
        if found != run_id:
            raise ConfigError(f"{self._path}: is the history of {found}, not of {run_id}; choose another --out")

    def _create(self, run_id: str) -> None:
        figures = ", ".join(f"{name} REAL" for name in COLUMNS)
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("CREATE TABLE run (run_id TEXT NOT NULL)")
            self._db.execute("INSERT INTO run VALUES (?)", (run_id,))
            self._db.execute(
                "CREATE TABLE samples (step_s INTEGER NOT NULL, t_s INTEGER NOT NULL, n INTEGER NOT NULL, "
                f"{figures}, PRIMARY KEY (step_s, t_s)) WITHOUT ROWID"
            )
            self._db.execute("CREATE TABLE evaluations (tokens INTEGER PRIMARY KEY, bits_per_byte REAL NOT NULL)")
            self._db.execute(f"PRAGMA user_version = {FORMAT}")


def _bucket_s(tier: Tier, covered_s: float) -> int:
    """The seconds that a point stands for, so that those of the time that is covered are not too many."""
    steps = int(covered_s // tier.step_s) + 1
    return tier.step_s * (-(-steps // (MAX_POINTS - 1)) or 1)


def _curves(rows: Sequence[tuple[float | None, ...]]) -> Curves:
    times = tuple(int(row[0] or 0) for row in rows)
    return Curves(t_s=times, figures={name: tuple(row[at] for row in rows) for at, name in enumerate(COLUMNS, start=1)})


def _taken_in(name: str) -> str:
    """How a row takes in one more sample; what is not known leaves it as it is."""
    if name in COUNTED:
        return f"{name} = COALESCE(excluded.{name}, {name})"
    # With either of them unknown the sum is, and the one that is known stays.
    return f"{name} = COALESCE({name} + (excluded.{name} - {name}) / (n + 1), excluded.{name}, {name})"


_UPSERT: Final = (
    f"INSERT INTO samples (step_s, t_s, n, {', '.join(COLUMNS)}) VALUES (?, ?, 1, {', '.join('?' * len(COLUMNS))}) "  # noqa: S608 - names of ours
    f"ON CONFLICT (step_s, t_s) DO UPDATE SET n = n + 1, {', '.join(map(_taken_in, COLUMNS))}"
)
_FORGET: Final = "DELETE FROM samples WHERE step_s = ? AND (t_s < ? OR t_s > ?)"
"""Rows of the future too, which a clock that was set back leaves: so there are never more than a tier may have."""

_THIN_EVALUATIONS: Final = (
    "DELETE FROM evaluations WHERE tokens IN (SELECT tokens FROM "
    "(SELECT tokens, ROW_NUMBER() OVER (ORDER BY tokens DESC) AS nth FROM evaluations) WHERE nth % 2 = 0)"
)
_FIRST: Final = "SELECT MIN(t_s) FROM samples WHERE step_s = ? AND t_s >= ?"
_CURVES: Final = (
    # SQLite takes a column that is not aggregated from the row of the maximum: counts are those of the latest row.
    f"SELECT MAX(t_s), {', '.join(COUNTED)}, {', '.join(f'AVG({name})' for name in AVERAGED)} "  # noqa: S608 - names of ours
    "FROM samples WHERE step_s = ?2 AND t_s >= ?3 GROUP BY t_s / ?1 ORDER BY 1"
)

"""Rows of a corpus that cannot be read: counted and told, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.errors import DataError


class BadRows:
    """What was wrong in one reading of a corpus. With `strict` the first bad row is raised instead."""

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self.skipped, self.first_skipped = 0, ""
        self.not_utf8, self.first_not_utf8 = 0, ""

    def skip(self, error: DataError) -> None:
        """Count a row that is left out for the reason that `error` tells."""
        if self._strict:
            raise error
        self.skipped += 1
        self.first_skipped = self.first_skipped or str(error)

    def keep(self, error: DataError) -> None:
        """Count a piece of text that is not UTF-8, and is read as the bytes that it is."""
        if self._strict:
            raise error
        self.not_utf8 += 1
        self.first_not_utf8 = self.first_not_utf8 or str(error)

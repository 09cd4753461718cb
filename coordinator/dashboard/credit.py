"""Credit as the page shows it: a ledger that another process fills, added up again and again.

Reading all pairs of peers takes seconds where there are very many, so it is done seldom, in a thread, and once for all
clients. Whoever fills the ledger does not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from common.errors import StorageError
from common.tasks import Periodic
from coordinator.credit.ledger import LEDGER_FILE, Ledger
from coordinator.credit.sums import CreditSums, read_sums

if TYPE_CHECKING:
    from pathlib import Path

    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

NO_FOLDER: Final = "No credit is shown here: start the dashboard with --credit FOLDER."


class CreditWatch:
    """What the ledger in `folder` comes to; nothing where there is no folder. Belongs to the event loop.

    `problem`: why there are no sums, or why they are older than they should be, if so.
    """

    def __init__(self, folder: Path | None, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self.sums = CreditSums(run_id=manifest.run_id, hosts=(), trainers=(), teams=(), unseen_receipts=0)
        self.problem = NO_FOLDER if folder is None else ""

    def every(self, period_s: float) -> Periodic:
        """Return what looks every `period_s` seconds, to be started and stopped."""
        return Periodic("credit watch", period_s, self.look)

    async def look(self) -> None:
        """Add it up once. Raises ConfigError for a ledger of another run."""
        if self._folder is None:
            return
        try:
            sums = await asyncio.to_thread(self._read, self._folder)
        except StorageError as error:
            if not self.problem:  # once, not at every look
                logger.warning("credit is not up to date: %s", error)
            self.problem = f"{error}."
            return
        self.problem = "" if sums else f"Nothing was collected yet in {self._folder}."
        self.sums = sums or self.sums

    def _read(self, folder: Path) -> CreditSums | None:
        """None where nobody has collected anything: the file is for others to make."""
        if not (folder / LEDGER_FILE).exists():
            return None
        ledger = Ledger(folder, self._manifest.run_id)
        try:
            ledger.open()
            return read_sums(ledger, self._manifest.run_id, self._manifest.model)
        finally:
            ledger.close()

"""The key that callers of a server must have: in a file that its owner alone may read, made if it is not there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from common.secret_file import secret_in

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


def read_key(path: Path) -> str:
    """The key in `path`, made there with mode 0600 if there is none.

    Raises:
        ConfigError: the file is unreadable, open to other users, or holds no key.
    """
    is_new = not path.exists()
    key = secret_in(path, f"--key-file {path}")
    if is_new:
        logger.info("A new key is in %s: clients send it as Authorization: Bearer KEY", path)
    return key

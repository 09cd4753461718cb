"""How many files and connections a process may have open at once: as many as its owner's hard limit allows."""

from __future__ import annotations

import contextlib
import logging
import resource

logger = logging.getLogger(__name__)

ENOUGH = 4096
"""A node with a few hundred peers, and its p2pd, do with so many."""


def raise_open_files_limit() -> int:
    """Raise the soft limit, which this process and its children have, to the hard one; which it is now, -1 for none.

    Tells in the log if that may be too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems name a hard limit that they do not grant: then this one's own enough, or it stays as it is.
    for wanted in (hard, ENOUGH):
        if _below(soft, wanted):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                soft = wanted
    if _below(soft, ENOUGH):
        logger.warning(
            "Only %d files and connections may be open at once, the hard limit here (ulimit -Hn); a node with many "
            "peers needs %d: raise it, in a systemd unit with LimitNOFILE=",
            soft,
            ENOUGH,
        )
    return soft


def _below(limit: int, other: int) -> bool:
    """Whether a limit is lower than another; the largest is none."""
    return limit != resource.RLIM_INFINITY and (other == resource.RLIM_INFINITY or limit < other)

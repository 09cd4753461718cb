"""Entry of the role: says what is missing before anything of libp2p is imported, which cannot stand beside hivemind."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    import trio

    from coordinator.lighthouse.config import LighthouseConfig


async def run_lighthouse(config: LighthouseConfig, stop: trio.Event) -> None:
    """Serve a run until `stop`. Raises a KilohiveError if that cannot start."""
    if importlib.util.find_spec("libp2p") is None:
        raise ConfigError("the lighthouse needs libp2p, which is not installed: run make setup-lighthouse")
    from coordinator.lighthouse.lighthouse import serve  # noqa: PLC0415 - see above

    await serve(config, stop)

"""What a host says of itself to its owner's page, as far as the page computes with it."""

from __future__ import annotations

from typing import Any

from node.host.page.credit import CreditFigures

CREDIT = CreditFigures(
    answered=10, waiting=4, trainers=1, confirmed=6, confirmed_today=2, receipts=3, first_s=1_700_000_000
)


def told(**changes: Any) -> dict[str, Any]:
    """What a host says that serves eight blocks and is asked for much; parts may be others."""
    parts: dict[str, dict[str, Any]] = {
        "held": {"serving": 8, "experts": 64, "joining": 0, "stored": 0, "blocks": []},
        "work": {"tokens_per_s": 1203.4, "tokens": 10},
        "availability": {"reasons": [], "unknown": [], "until_s": None, "away": False, "leaving": False},
        "use": {"cpu_s": 0.0, "sent_bytes": 0, "received_bytes": 0},
    }
    known = {name: {**part, **changes.pop(name, {})} for name, part in parts.items()}
    return {"now_s": 1000.0, "started_s": 900.0, "reachability": "reached", **known, **changes}

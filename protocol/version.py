"""What this node runs, as peers see it."""

from __future__ import annotations

VERSION = "0.1.0"
SOFTWARE = f"kilohive/{VERSION}"

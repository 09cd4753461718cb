"""Numbers, trends and addresses as short texts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
SHORT_ID_CHARS = 6
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
KILO = 1000
MAX_PEER_WORDS_CHARS = 200


def sparkline(points: Sequence[float], width: int) -> str:
    """Draw `points` as at most `width` block characters: means of their shares, scaled from lowest to highest."""
    n = min(width, len(points))
    cells = [_mean(points[i * len(points) // n : (i + 1) * len(points) // n]) for i in range(n)]
    if not cells:
        return ""
    low, span = min(cells), (max(cells) - min(cells)) or 1.0
    return "".join(BARS[round((cell - low) / span * (len(BARS) - 1))] for cell in cells)


def _mean(points: Sequence[float]) -> float:
    return sum(points) / len(points)


def short_id(peer_id: str) -> str:
    """The end of a peer id: every Ed25519 id begins alike."""
    return f"…{peer_id[-SHORT_ID_CHARS:]}" if len(peer_id) > SHORT_ID_CHARS else peer_id


def clock_text(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def moment_text(seconds: float) -> str:
    """A moment, in seconds since 1970, by this machine's clock: `05 Dec 14:30`."""
    return time.strftime("%d %b %H:%M", time.localtime(seconds))


def in_byte_units(n_bytes: float) -> tuple[float, str]:
    """An amount of bytes below a thousand, as far as there are units, and its decimal unit."""
    index = 0
    while round(n_bytes) >= KILO and index < len(BYTE_UNITS) - 1:
        n_bytes, index = n_bytes / KILO, index + 1
    return n_bytes, BYTE_UNITS[index]


def bytes_text(n_bytes: float) -> str:
    """Decimal units, three digits."""
    size, unit = in_byte_units(n_bytes)
    return f"{size:.3g} {unit}"


def count_text(n: float) -> str:
    """Thousands parted by commas; three digits for millions and more."""
    return f"{n / 1e6:,.2f} M" if n >= 1e6 else f"{n:,.0f}"  # noqa: PLR2004 - a million


def hosts_text(n_hosts: int) -> str:
    """`1 host`, `4 hosts`."""
    return f"{n_hosts} host" if n_hosts == 1 else f"{n_hosts} hosts"


def host_port(host: str, port: int) -> str:
    """HOST:PORT as gRPC and people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def printable(text: str) -> str:
    """Lines of `text` as a terminal may show them: a byte-level model can emit any control character."""
    return _without_controls(text, "·", kept="\n")


def peer_words(text: str, max_chars: int = MAX_PEER_WORDS_CHARS) -> str:
    """A peer's words, cut short, as one line that may stand on a terminal."""
    return _without_controls(text[:max_chars], "?")


def escaped(text: str) -> str:
    r"""`text` as one line that may stand on a terminal: what it would obey, or not show, is written like `\n`."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _without_controls(text: str, instead: str, kept: str = "") -> str:
    return "".join(char if char.isprintable() or char in kept else instead for char in text)


def last_line(text: str) -> str:
    """The last line of an error's words, or nothing: libp2p gives each attempt to dial a line of its own."""
    lines = text.strip().splitlines()
    return lines[-1].strip(" *") if lines else ""

"""The file in a host's folder that says whether the host works, and why not, for `health` and for the owner's eyes.

It is not on the wire: which program runs beside a host, and whether somebody sits there, is nobody else's business.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from common.atomic_file import write_atomically
from common.errors import ConfigError, InvalidInputError
from common.events import read_event
from node.limits.events import AvailabilityEvent

if TYPE_CHECKING:
    from pathlib import Path

AVAILABILITY_FILE = "availability.json"
MAX_FILE_BYTES = 65_536


def write_availability(folder: Path, event: AvailabilityEvent) -> None:
    """Write it whole or not at all; raises OSError."""
    write_atomically(folder / AVAILABILITY_FILE, f"{json.dumps(event.to_row())}\n".encode())


def read_availability(folder: Path) -> AvailabilityEvent | None:
    """What the host of a folder last wrote, None where it has not; raises ConfigError for a damaged file."""
    path = folder / AVAILABILITY_FILE
    try:
        with path.open("rb") as file:
            event = read_event(file.read(MAX_FILE_BYTES), AvailabilityEvent)
    except FileNotFoundError:
        return None
    except (OSError, InvalidInputError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if event is None:
        raise ConfigError(f"{path}: does not say whether its host works; start the host again to have it written anew")
    return event

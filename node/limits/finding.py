"""What a look at one of the owner's conditions for working finds, whatever it looks at."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """Why the host must not work now, and what cannot be known here: each a sentence, or empty.

    What cannot be known counts as nothing against working; the sentence says so.
    """

    against: str = ""
    unknown: str = ""

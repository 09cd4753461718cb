"""What a volunteer can set about credit. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass

from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What a volunteer wants to be called where credit is shown."""

    name: FileOnly[str] = ""
    """Show this name, of up to 32 characters, beside what this node earns; without one it is anonymous."""
    team: FileOnly[str] = ""
    """Count what this node earns for this team too."""

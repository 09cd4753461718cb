"""What a page tells those who want to take part: an invite without any secret, and commands to copy."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol.invite import Invite

if TYPE_CHECKING:
    from coordinator.dashboard.config import DashboardConfig
    from protocol.manifest import Manifest
    from protocol.swarm_file import SwarmFile

STATE = "~/.local/state/kilohive"
UNIT = "~/.config/systemd/user/kilohive-host.service"


@dataclass(frozen=True, kw_only=True)
class WaysIn:
    """How to join a run. `invite` is empty where the run is closed: its token is for its owner to hand out."""

    invite: str
    expires_s: int
    closed: bool
    package: str
    image: str

    def as_json(self, now_s: float) -> dict[str, Any]:
        """What a page shows at `now_s`, seconds since 1970; an invite that has expired is not shown."""
        expired = 0 < self.expires_s <= now_s
        invite = "" if expired else self.invite
        return {
            "closed": self.closed,
            "expired": expired,
            "expires_s": self.expires_s,
            "invite": invite,
            "ways": _ways(invite, self.package, self.image) if invite else [],
        }


def ways_in(
    config: DashboardConfig, manifest: Manifest, initial_peers: tuple[str, ...], told: Invite | SwarmFile | None
) -> WaysIn:
    """How to join the run that `config` names, through `initial_peers`; `told` is what its invite or file says."""
    closed = bool(told and told.admission)
    expires_s = told.expires_s if isinstance(told, Invite) else 0
    invite = Invite(
        run_id=manifest.run_id, initial_peers=initial_peers, owner=manifest.owner, expires_s=expires_s
    ).encode()
    return WaysIn(
        invite="" if closed else invite,
        expires_s=expires_s,
        closed=closed,
        package=config.package,
        image=config.image,
    )


def _ways(invite: str, package: str, image: str) -> list[dict[str, str]]:
    wheel, joins = shlex.quote(package), f"host --join {invite}"
    return [
        {
            "name": "pip",
            "about": "Into a folder of its own, with Python 3.11, 3.12 or 3.13:",
            "text": f"python3 -m venv ~/kilohive\n~/kilohive/bin/pip install {wheel}\n"
            f"~/kilohive/bin/kilohive {joins} --state {STATE}",
        },
        {
            "name": "uvx",
            "about": "With uv, which fetches Python too:",
            "text": f"uvx --python 3.13 --from {wheel} kilohive {joins} --state {STATE}",
        },
        {
            "name": "Docker",
            "about": "In a container, which keeps its blocks in a volume and starts again with the machine:",
            "text": "docker run --detach --init --restart unless-stopped --network host --name kilohive "
            f"--volume kilohive:/kilohive/state {shlex.quote(image)} {joins}",
        },
        {
            "name": "systemd",
            "about": "As a service of your user, with uv; it starts again with the machine:",
            "text": _service(wheel, joins),
        },
    ]


def _service(wheel: str, joins: str) -> str:
    return "\n".join(
        (
            f"uv tool install --python 3.13 {wheel}",
            "mkdir -p ~/.config/systemd/user",
            f"cat > {UNIT} <<'END'",
            "[Unit]",
            "Description=Kilohive host",
            "",
            "[Service]",
            f"ExecStart=%h/.local/bin/kilohive {joins} --state %h/.local/state/kilohive",
            "Restart=on-failure",
            "RestartSec=30",
            "KillMode=mixed",
            "TimeoutStopSec=30",
            "Nice=10",
            "",
            "[Install]",
            "WantedBy=default.target",
            "END",
            "systemctl --user enable --now kilohive-host",
            "loginctl enable-linger",
        )
    )

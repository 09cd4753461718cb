"""Which of this machine's addresses others should call, seen from the peers that it knows."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING

from common.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable

AUTO = "auto"
DEFAULT_ROUTES = ("/ip4/192.0.2.1", "/ip6/2001:db8::1")
"""Stand-ins for initial peers at the first node of a swarm: addresses kept for documentation, so the route leads
out."""

_ANY_PORT = 9


def listen_host(listen: str, initial_peers: Iterable[str]) -> str:
    """`listen`; for `auto` the address from which this machine would reach the first initial peer that it can.

    Nothing is sent. Raises ConfigError if there is none.
    """
    if listen != AUTO:
        return listen
    for address in initial_peers:
        found = _source_towards(address)
        if found is not None:
            return found
    raise ConfigError(
        "--listen: cannot tell which address of this machine the others reach; give one, or listen in the file of "
        "--config where a command has no such flag"
    )


def cannot_listen(host: str, port: int, error: OSError) -> UnavailableError:
    """What a person is told of an address that this machine does not give."""
    hint = "stop what uses it or choose another, 0 takes any" if port else "choose an address of this machine"
    return UnavailableError(f"cannot listen on {host} port {port}: {error.strerror}; {hint}")


def is_own(host: str) -> bool:
    """Whether an IP address is one of this machine's at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def tcp_address(host: str, port: int) -> str:
    """An IP address and a port as a multiaddress."""
    address = ipaddress.ip_address(host)
    return f"/ip{address.version}/{address}/tcp/{port}"


def _source_towards(multiaddress: str) -> str | None:
    """None for an address that is not numeric, or that this machine has no way to."""
    host = multiaddress.split("/")[2]
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    family = socket.AF_INET if version == 4 else socket.AF_INET6  # noqa: PLR2004
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((host, _ANY_PORT))
        return str(probe.getsockname()[0])
    return None

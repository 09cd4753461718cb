"""Which of this machine's addresses others should call, seen from the peers that it knows."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING

from common.errors import ConfigError, UnavailableError
from protocol.addresses import split_flag

if TYPE_CHECKING:
    from collections.abc import Iterable

AUTO = "auto"
DEFAULT_ROUTES = ("/ip4/192.0.2.1", "/ip6/2001:db8::1")
"""Stand-ins for initial peers at the first node of a swarm: addresses kept for documentation, so the route leads
out."""

_ANY_PORT = 9


def listen_host(listen: str, initial_peers: Iterable[str]) -> str:
    """The IP address of `listen`; for `auto` that from which this machine would reach the first initial peer it can.

    Names are looked up, which blocks; otherwise nothing is sent. Raises ConfigError if there is none.
    """
    if listen != AUTO:
        return _own_address(listen)
    for address in initial_peers:
        found = _source_towards(address)
        if found is not None:
            return found
    raise ConfigError(
        "--listen: cannot tell which address of this machine the others reach, as none of their names can be looked up "
        "or no route leads to them; give one, or listen in the file of "
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
    """None for a name that nobody knows, or an address that this machine has no way to."""
    for host in looked_up(multiaddress.split("/")[2]):
        found = _source_towards_ip(host)
        if found is not None:
            return found
    return None


def _own_address(listen: str) -> str:
    """The IP address that a person named; of a name the one that is this machine's. Raises ConfigError."""
    host, port = split_flag("--listen", listen)
    if port:
        raise ConfigError(
            f"--listen: takes an address without a port, is {listen[:80]!r}; flags for ports are beside it"
        )
    found = looked_up(host)
    if host in found:
        return host
    own = next(filter(is_own, found), None)
    if own is None:
        at = f"is {', '.join(found)}, which is no address of this machine" if found else "cannot be looked up"
        raise ConfigError(f"--listen: {host} {at}; give an address of this machine")
    return own


def served_address(listen: str) -> str:
    """The IP address of a `--listen` on which a server is to answer, which may be a name. Raises ConfigError."""
    found = looked_up(listen)
    if not found:
        raise ConfigError(f"--listen: {listen[:80]!r} cannot be looked up; give an address of this machine")
    return found[0]


def looked_up(host: str) -> tuple[str, ...]:
    """The IP addresses of a name, none if nobody knows it, or the one that `host` is. Blocks while it asks."""
    try:
        return (str(ipaddress.ip_address(host.strip("[]"))),)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def _source_towards_ip(host: str) -> str | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((host, _ANY_PORT))
        return str(probe.getsockname()[0])
    return None

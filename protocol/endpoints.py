"""Where a node is called: `host:port`, or `relay:` and the peer ids of those that carry calls to it, if there are any.

Without any it is reached only by those whom it has dialled itself, over that connection.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from common.errors import ConfigError, IdentityError, RecordError
from common.text import host_port
from protocol.addresses import split_flag
from protocol.identity import public_key_of

MAX_ENDPOINT_CHARS = 261
"""255 characters of host name, brackets, colon, port."""

MAX_RELAYS = 2
RELAY = "relay:"
SHOWN_CHARS = 6
MAX_RELAY_ADDRESS_CHARS = 80


class Address(NamedTuple):
    """Whom to call, and where."""

    peer_id: str
    endpoint: str


_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,253}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_MAX_PORT = 65_535
_TCP_ADDRESS = re.compile(r"/ip(?:4/[0-9.]{7,15}|6/[0-9A-Fa-f:.]{2,45})/tcp/([1-9][0-9]{0,4})")
_UDP_ADDRESS = re.compile(r"/ip(?:4/[0-9.]{7,15}|6/[0-9A-Fa-f:.]{2,45})/udp/([1-9][0-9]{0,4})/quic-v1")


def relayed_endpoint(relays: tuple[str, ...]) -> str:
    """Return the endpoint of a node that is reached through these peers, the best one first."""
    return RELAY + ",".join(relays)


def announced_endpoint(announce: str, listening: str) -> str:
    """`listening`, host:port, as others call it: at the host, or host:port, `announce`, if that is given.

    Raises ConfigError naming --announce.
    """
    if not announce:
        return listening
    host, port = split_flag("--announce", announce)
    endpoint = host_port(host, port or int(listening.rpartition(":")[2]))
    try:
        _check_address(endpoint)
    except RecordError:
        raise ConfigError(f"--announce: must be like 192.0.2.1 or 192.0.2.1:4000, is {announce[:80]!r}") from None
    return endpoint


def announced_host(announce: str) -> str:
    """The host alone, without brackets; raises ConfigError naming --announce."""
    return split_flag("--announce", announce)[0] if announce else ""


def is_relayed(endpoint: str) -> bool:
    """Whether nothing can be dialled there."""
    return endpoint.startswith(RELAY)


def relays_of(endpoint: str) -> tuple[str, ...]:
    """Peer ids of the relays that an endpoint names; none if it is dialled itself."""
    named = endpoint.removeprefix(RELAY) if is_relayed(endpoint) else ""
    return tuple(named.split(",")) if named else ()


def endpoint_text(endpoint: str) -> str:
    """Format an endpoint for a person: host:port, or the ends of its relays' peer ids."""
    if not is_relayed(endpoint):
        return endpoint
    names = " and ".join(f"…{relay[-SHOWN_CHARS:]}" for relay in relays_of(endpoint))
    return f"relayed by {names}" if names else "no relay"


def check_endpoint(endpoint: str) -> None:
    """Raise RecordError unless `endpoint` is host:port, or `relay:` and up to MAX_RELAYS different peer ids."""
    if is_relayed(endpoint):
        _check_relays(relays_of(endpoint[:MAX_ENDPOINT_CHARS]))
        return
    _check_address(endpoint)


def _check_address(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    well_formed = len(endpoint) <= MAX_ENDPOINT_CHARS and _HOST_NAME.fullmatch(host) and _PORT.fullmatch(port)
    if not well_formed or int(port) > _MAX_PORT:
        raise RecordError(f"endpoint: must be host:port such as 192.0.2.1:4000, is {endpoint[:80]!r}")


def is_udp_address(address: str) -> bool:
    """Whether this is a numeric multiaddress such as /ip4/192.0.2.1/udp/4001/quic-v1."""
    return _has_form(address, _UDP_ADDRESS)


def is_relay_address(address: str) -> bool:
    """Whether a relay can be dialled there: over UDP as above or, at a lighthouse, at /ip4/192.0.2.1/tcp/4001."""
    return _has_form(address, _UDP_ADDRESS) or _has_form(address, _TCP_ADDRESS)


def _has_form(address: str, form: re.Pattern[str]) -> bool:
    match = form.fullmatch(address[: MAX_RELAY_ADDRESS_CHARS + 1])
    return match is not None and len(address) <= MAX_RELAY_ADDRESS_CHARS and int(match[1]) <= _MAX_PORT


def _check_relays(relays: tuple[str, ...]) -> None:
    if len(relays) > MAX_RELAYS or len(set(relays)) < len(relays):
        raise RecordError(f"endpoint: names {len(relays)} relays, at most {MAX_RELAYS} different ones are allowed")
    for relay in relays:
        try:
            public_key_of(relay)
        except IdentityError as error:
            raise RecordError(f"endpoint: {relay[:60]!r} is no relay's peer id ({error})") from None


def is_loopback(host: str) -> bool:
    """Whether a host, an IP address with or without brackets or a name, is this machine and nothing else."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

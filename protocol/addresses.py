"""Addresses as people write them: an IP address or a name, with a port or without, or a multiaddress."""

from __future__ import annotations

import ipaddress
import re

from common.errors import ConfigError

MAX_CHARS = 512
_MAX_PORT = 65_535
_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?)*"
)
_MULTIADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)(?:/tcp/([0-9]+))?")


def split_address(text: str) -> tuple[str, int]:
    """Host without brackets, and port, 0 where none is named; raises ValueError for what is no address.

    2001:db8::1, [2001:db8::1], [2001:db8::1]:4001, /ip6/2001:db8::1/tcp/4001, and the like of IPv4 and names are read.
    """
    host, port = _parts(text[: MAX_CHARS + 1])
    if port is not None and not (port.isascii() and port.isdecimal() and 0 < int(port) <= _MAX_PORT):
        raise ValueError(f"{port[:20]!r} is no port")
    return _checked_host(host), int(port or 0)


def tcp_multiaddress(host: str, port: int) -> str:
    """An IP address or a name, and a port, as a multiaddress; peers look a name up each time that they connect."""
    try:
        return f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{port}"
    except ValueError:
        return f"/dns/{host}/tcp/{port}"


def peer_multiaddress(text: str) -> str:
    """A peer's multiaddress, also from HOST:PORT/p2p/ID; what cannot be read stays as it is, for others to refuse."""
    where, marker, peer_id = text.partition("/p2p/")
    if text.startswith("/") or not marker:
        return text
    try:
        host, port = split_address(where)
    except ValueError:
        return text
    return f"{tcp_multiaddress(host, port)}/p2p/{peer_id}" if port else text


def _parts(text: str) -> tuple[str, str | None]:
    if text.startswith("/"):
        match = _MULTIADDRESS.fullmatch(text)
        if match is None:
            raise ValueError("no such multiaddress")
        return match[2], match[3]
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        if ":" not in host or (rest and not rest.startswith(":")):
            raise ValueError("brackets are for IPv6")
        return host, rest[1:] if rest else None
    if text.count(":") > 1:
        return text, None
    host, colon, port = text.partition(":")
    return host, port if colon else None


def _checked_host(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        looks_numeric = ":" in host or host.replace(".", "").isdigit()
        if looks_numeric or not _NAME.fullmatch(host):
            raise ValueError(f"{host[:80]!r} is no host") from None
    return host


def split_flag(flag: str, text: str) -> tuple[str, int]:
    """`split_address` of what a person gave; raises ConfigError naming the flag."""
    try:
        return split_address(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: must be like 192.0.2.1 or 192.0.2.1:4000, is {text[:80]!r} ({error})") from None

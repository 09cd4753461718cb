"""Addresses as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.text import host_port
from protocol.addresses import peer_multiaddress, split_address, tcp_multiaddress
from protocol.swarm_file import checked_peers

SIX = "2001:db8::1"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.0.2.1", "192.0.2.1", 0),
        ("192.0.2.1:4001", "192.0.2.1", 4001),
        ("node-1.example.org:4001", "node-1.example.org", 4001),
        (SIX, SIX, 0),
        (f"[{SIX}]", SIX, 0),
        (f"[{SIX}]:4001", SIX, 4001),
        (f"/ip6/{SIX}/tcp/4001", SIX, 4001),
        ("/dns4/example.org", "example.org", 0),
        ("::1", "::1", 0),
    ],
)
def test_each_spelling_is_read(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)


@pytest.mark.parametrize(
    "text", ["", "a b", "192.0.2.300", "1.2.3", "x:0", "x:70000", "[x]:1", "[::1]4001", "http://x", "-x", "x..y"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        split_address(text)


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        host, port = split_address(text)
        assert split_address(host_port(host, port or 1)) == (host, port or 1)


def test_initial_peers_are_named_as_people_write_them() -> None:
    assert tcp_multiaddress(SIX, 4001) == f"/ip6/{SIX}/tcp/4001"
    assert peer_multiaddress(f"[{SIX}]:4001/p2p/X") == f"/ip6/{SIX}/tcp/4001/p2p/X"
    typed = ["example.org:4001/p2p/X", "/dns4/example.org/tcp/4001/p2p/X", "192.0.2.1:4001/p2p/X"]
    assert checked_peers(typed) == ("/dns/example.org/tcp/4001/p2p/X", typed[1], "/ip4/192.0.2.1/tcp/4001/p2p/X")

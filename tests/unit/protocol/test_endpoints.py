"""Endpoints as records may name them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, RecordError
from protocol.endpoints import (
    announced_endpoint,
    announced_host,
    check_endpoint,
    is_relay_address,
    is_relayed,
    is_udp_address,
    relayed_endpoint,
    relays_of,
)
from protocol.identity import Identity

ONE, TWO, THREE = (Identity.generate().peer_id for _ in range(3))


def test_relays_are_named_in_order() -> None:
    endpoint = relayed_endpoint((ONE, TWO))
    check_endpoint(endpoint)
    assert relays_of(endpoint) == (ONE, TWO)
    assert relays_of("192.0.2.1:4000") == ()


def test_a_node_without_a_relay_is_not_dialled_either() -> None:
    check_endpoint(relayed_endpoint(()))
    assert is_relayed(relayed_endpoint(()))
    assert relays_of(relayed_endpoint(())) == ()
    assert not is_relayed("192.0.2.1:4000")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ((ONE, TWO, THREE), "names 3 relays, at most 2"),
        ((ONE, ONE), "names 2 relays, at most 2 different ones"),
        ((ONE, "192.0.2.1:4000"), "is no relay's peer id"),
        ((ONE, ONE[:-1]), "is no relay's peer id"),
    ],
    ids=["three", "twice the same", "an address", "a part of an id"],
)
def test_what_names_no_relays_is_refused(named: tuple[str, ...], words: str) -> None:
    with pytest.raises(RecordError, match=words):
        check_endpoint(relayed_endpoint(named))


def test_a_long_list_of_relays_is_refused() -> None:
    with pytest.raises(RecordError, match="relays"):
        check_endpoint(relayed_endpoint((ONE, TWO)) + "," * 100_000)


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("/ip4/192.0.2.1/udp/4001/quic-v1", True),
        ("/ip6/2001:db8::1/udp/65535/quic-v1", True),
        ("/ip4/192.0.2.1/udp/65536/quic-v1", False),
        ("/ip4/192.0.2.1/tcp/4001", False),
        ("/dns4/example.org/udp/4001/quic-v1", False),
        ("/ip4/192.0.2.1/udp/4001/quic-v1/p2p-circuit", False),
        ("", False),
    ],
)
def test_only_numeric_quic_addresses_are_dialled(address: str, *, good: bool) -> None:
    assert is_udp_address(address) is good


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("/ip4/192.0.2.1/udp/4001/quic-v1", True),
        ("/ip4/192.0.2.1/tcp/4001", True),
        ("/ip6/2001:db8::1/tcp/65535", True),
        ("/ip4/192.0.2.1/tcp/65536", False),
        ("/ip4/192.0.2.1/tcp/4001/p2p-circuit", False),
        ("/dns4/example.org/tcp/4001", False),
        ("/ip4/192.0.2.1/tcp/4001" + "/" * 400, False),
        ("", False),
    ],
)
def test_relays_are_dialled_over_tcp_too(address: str, *, good: bool) -> None:
    assert is_relay_address(address) is good


@given(st.text(max_size=400))
def test_any_text_is_an_endpoint_or_a_record_error(text: str) -> None:
    with contextlib.suppress(RecordError):
        check_endpoint(text)
        assert ":" in text


@pytest.mark.parametrize(
    ("announce", "endpoint", "host"),
    [
        ("", "10.0.0.2:4000", ""),
        ("192.0.2.1", "192.0.2.1:4000", "192.0.2.1"),
        ("192.0.2.1:5000", "192.0.2.1:5000", "192.0.2.1"),
        ("[2001:db8::1]", "[2001:db8::1]:4000", "2001:db8::1"),
        ("[2001:db8::1]:5000", "[2001:db8::1]:5000", "2001:db8::1"),
        ("node.example.org", "node.example.org:4000", "node.example.org"),
        ("node.example.org:5000", "node.example.org:5000", "node.example.org"),
        ("2001:db8::1", "[2001:db8::1]:4000", "2001:db8::1"),
        ("2001:DB8:0::1", "[2001:db8::1]:4000", "2001:db8::1"),
        ("/ip6/2001:db8::1/tcp/5000", "[2001:db8::1]:5000", "2001:db8::1"),
        ("/ip4/192.0.2.1", "192.0.2.1:4000", "192.0.2.1"),
        ("/dns4/node.example.org/tcp/5000", "node.example.org:5000", "node.example.org"),
    ],
)
def test_what_a_router_forwards_is_announced_in_place_of_the_port(announce: str, endpoint: str, host: str) -> None:
    assert announced_endpoint(announce, "10.0.0.2:4000") == endpoint
    assert announced_host(announce) == host


@pytest.mark.parametrize("announce", ["192.0.2.1:0", "192.0.2.1:70000", "a b", "relay:", "http://example.org"])
def test_what_cannot_be_announced_is_the_users_mistake(announce: str) -> None:
    with pytest.raises(ConfigError, match="--announce: must be like"):
        announced_endpoint(announce, "10.0.0.2:4000")

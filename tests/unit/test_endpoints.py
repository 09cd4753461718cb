"""Endpoints as records may name them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.endpoints import check_endpoint, is_udp_address, relayed_endpoint, relays_of
from protocol.errors import RecordError
from protocol.identity import Identity

ONE, TWO, THREE = (Identity.generate().peer_id for _ in range(3))


def test_relays_are_named_in_order() -> None:
    endpoint = relayed_endpoint((ONE, TWO))
    check_endpoint(endpoint)
    assert relays_of(endpoint) == (ONE, TWO)
    assert relays_of("192.0.2.1:4000") == ()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ((ONE, TWO, THREE), "names 3 relays, at most 2"),
        ((ONE, ONE), "names 2 relays, at most 2 different ones"),
        (("",), "is no relay's peer id"),
        ((ONE, "192.0.2.1:4000"), "is no relay's peer id"),
        ((ONE, ONE[:-1]), "is no relay's peer id"),
    ],
    ids=["three", "twice the same", "none", "an address", "a part of an id"],
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


@given(st.text(max_size=400))
def test_any_text_is_an_endpoint_or_a_record_error(text: str) -> None:
    with contextlib.suppress(RecordError):
        check_endpoint(text)
        assert ":" in text

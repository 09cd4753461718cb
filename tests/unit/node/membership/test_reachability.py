"""What others' answers come to, and how gRPC's word for a caller's address is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInputError
from common.text import peer_words
from node.membership.reachability import observed_host, verdict
from protocol import reach_pb2 as pb

YES = pb.DialBackResponse(observed="192.0.2.1", reached=True)
NO = pb.DialBackResponse(observed="192.0.2.1", reached=False, problem="refused")
ELSEWHERE = pb.DialBackResponse(observed="198.51.100.1", reached=True)


def test_one_who_got_through_is_enough() -> None:
    assert verdict([NO, YES], "192.0.2.1:4000") == "reached"
    assert verdict([NO, NO], "192.0.2.1:4000") == "not reached"


def test_a_name_is_its_addresses_and_an_address_each_of_its_spellings() -> None:
    assert verdict([YES], "node.lan:4000", ("192.0.2.1",)) == "reached"
    assert verdict([YES], "node.lan:4000", ("192.0.2.9",)) == "not reached"
    six = pb.DialBackResponse(observed="[2001:db8:0::1]", reached=True)
    assert verdict([six], "[2001:db8::1]:4000") == "reached"


def test_an_answer_at_another_address_than_the_announced_is_no_help_to_others() -> None:
    assert verdict([ELSEWHERE], "192.0.2.1:4000") == "not reached"


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:192.0.2.1:4000", "192.0.2.1"), ("ipv6:%5B2001:db8::1%5D:4000", "[2001:db8::1]")],
)
def test_the_callers_address_is_read(peer: str, host: str) -> None:
    assert observed_host(peer) == host


@pytest.mark.parametrize("peer", ["unix:/tmp/socket", "ipv4:example.org:80", "ipv4:", "", "vsock:2:4000"])
def test_what_is_no_ip_address_is_not_dialled(peer: str) -> None:
    with pytest.raises(InvalidInputError):
        observed_host(peer)


@given(st.text(max_size=300))
def test_a_peers_words_are_short_and_printable(text: str) -> None:
    assert len(peer_words(text)) <= 200
    assert peer_words(text).isprintable()

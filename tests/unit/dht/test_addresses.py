"""A node announces the address from which it reaches the peers that it knows."""

from __future__ import annotations

import pytest

from common.errors import ConfigError
from dht import addresses
from dht.addresses import DEFAULT_ROUTES, listen_host

LOOPBACK = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWx"
NAMED = "/dns4/example.org/tcp/4001/p2p/12D3KooWx"


def test_what_a_person_gives_is_taken() -> None:
    assert listen_host("192.0.2.1", [LOOPBACK]) == "192.0.2.1"


def test_towards_loopback_it_is_loopback() -> None:
    assert listen_host("auto", [LOOPBACK]) == "127.0.0.1"
    assert listen_host("auto", [NAMED, LOOPBACK]) == "127.0.0.1"


def test_with_names_alone_it_must_be_given() -> None:
    with pytest.raises(ConfigError, match="--listen: cannot tell"):
        listen_host("auto", [NAMED])


def test_the_first_node_of_a_swarm_takes_the_address_that_leads_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_source_towards", {"/ip6/2001:db8::1": "2001:db8::7"}.get)
    assert listen_host("auto", DEFAULT_ROUTES) == "2001:db8::7"
    assert listen_host("192.0.2.1", DEFAULT_ROUTES) == "192.0.2.1"

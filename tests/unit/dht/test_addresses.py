"""A node announces the address from which it reaches the peers that it knows."""

from __future__ import annotations

import socket
from typing import NoReturn

import pytest

from common.errors import ConfigError
from dht import addresses
from dht.addresses import DEFAULT_ROUTES, listen_host, served_address

LOOPBACK = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWx"
NAMED = "/dns4/example.org/tcp/4001/p2p/12D3KooWx"


def test_what_a_person_gives_is_taken() -> None:
    assert listen_host("192.0.2.1", [LOOPBACK]) == "192.0.2.1"


def test_towards_loopback_it_is_loopback() -> None:
    assert listen_host("auto", [LOOPBACK]) == "127.0.0.1"
    assert listen_host("auto", [NAMED, LOOPBACK]) == "127.0.0.1"


def test_with_names_that_nobody_knows_it_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="--listen: cannot tell"):
        listen_host("auto", [NAMED])


def unknown(*_: object, **__: object) -> NoReturn:
    raise socket.gaierror("Name or service not known")


def test_a_name_of_the_swarm_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listen_host("auto", ["/dns4/localhost/tcp/4001/p2p/12D3KooWx"]) == "127.0.0.1"
    monkeypatch.setattr(addresses, "looked_up", {"example.org": ("192.0.2.1", "127.0.0.1")}.get)
    monkeypatch.setattr(addresses, "_source_towards_ip", {"127.0.0.1": "127.0.0.1"}.get)
    assert listen_host("auto", [NAMED]) == "127.0.0.1"


@pytest.mark.parametrize("spelling", ["::1", "[::1]", "/ip6/::1", "0:0:0:0:0:0:0:1"])
def test_each_spelling_of_an_address_is_the_same(spelling: str) -> None:
    assert listen_host(spelling, ()) == "::1"


def test_a_name_of_this_machine_is_listened_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "looked_up", lambda _: ("198.51.100.1", "127.0.0.1"))
    assert listen_host("me.example.org", ()) == "127.0.0.1"
    monkeypatch.setattr(addresses, "looked_up", lambda _: ("198.51.100.1",))
    with pytest.raises(
        ConfigError, match=r"--listen: me\.example\.org is 198\.51\.100\.1, which is no address of this"
    ):
        listen_host("me.example.org", ())
    monkeypatch.setattr(addresses, "looked_up", lambda _: ())
    with pytest.raises(ConfigError, match="cannot be looked up"):
        listen_host("me.example.org", ())


def test_a_server_listens_on_the_address_that_a_name_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [served_address(listen) for listen in ("0.0.0.0", "[::1]")] == ["0.0.0.0", "::1"]  # noqa: S104
    monkeypatch.setattr(addresses, "looked_up", {"me.example.org": ("192.0.2.1", "192.0.2.2")}.get)
    assert served_address("me.example.org") == "192.0.2.1"
    with pytest.raises(ConfigError, match="--listen: 'nobody' cannot be looked up"):
        served_address("nobody")


@pytest.mark.parametrize("listen", ["192.0.2.1:4001", "[::1]:4001", "/ip4/192.0.2.1/tcp/4001"])
def test_a_port_has_flags_of_its_own(listen: str) -> None:
    with pytest.raises(ConfigError, match="--listen: takes an address without a port"):
        listen_host(listen, ())


def test_the_first_node_of_a_swarm_takes_the_address_that_leads_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_source_towards", {"/ip6/2001:db8::1": "2001:db8::7"}.get)
    assert listen_host("auto", DEFAULT_ROUTES) == "2001:db8::7"
    assert listen_host("192.0.2.1", DEFAULT_ROUTES) == "192.0.2.1"

from __future__ import annotations

import socket

import pytest

from common.errors import ConfigError, UnavailableError
from dht import daemon
from dht.daemon import DaemonAddresses, daemon_addresses, listen_address


def test_an_address_becomes_a_multiaddress() -> None:
    assert listen_address("127.0.0.1", 0) == "/ip4/127.0.0.1/tcp/0"


@pytest.mark.parametrize(
    ("host", "port", "problem"),
    [
        ("localhost", 0, "must be an IP address"),
        ("0.0.0.0", 0, "announced to others, who cannot call it"),  # noqa: S104 - refused, that is the point
        ("::", 0, "announced to others, who cannot call it"),
        ("127.0.0.1", 70_000, "port: must be from 0"),
    ],
)
def test_an_address_that_others_cannot_call_is_a_usage_error(host: str, port: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        listen_address(host, port)


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UnavailableError, match="stop what uses it or choose another"):
            listen_address("127.0.0.1", taken.getsockname()[1])


def test_on_loopback_nobody_needs_quic() -> None:
    assert daemon_addresses("127.0.0.1", 0, "") == DaemonAddresses(("/ip4/127.0.0.1/tcp/0",))


def test_elsewhere_quic_is_taken_and_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_check_free", lambda *_: None)
    tcp, udp = "/ip4/192.0.2.7/tcp/4001", "/ip4/192.0.2.7/udp/4001/quic-v1"
    assert daemon_addresses("192.0.2.7", 4001, "") == DaemonAddresses((tcp, udp), tcp, udp)
    outside = "/ip4/198.51.100.1"
    announced = DaemonAddresses((tcp, udp), f"{outside}/tcp/4001", f"{outside}/udp/4001/quic-v1")
    assert daemon_addresses("192.0.2.7", 4001, "198.51.100.1") == announced


def test_a_port_that_is_told_to_others_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_check_free", lambda *_: None)
    monkeypatch.setattr(daemon, "_free_port", lambda _: 4567)
    assert daemon_addresses("192.0.2.7", 0, "").announced == "/ip4/192.0.2.7/tcp/4567"
    with pytest.raises(ConfigError, match="--announce: needs a --dht-port too"):
        daemon_addresses("192.0.2.7", 0, "198.51.100.1")
    with pytest.raises(ConfigError, match="--announce: must be like"):
        daemon_addresses("192.0.2.7", 4001, "http://example.org")


@pytest.mark.parametrize(
    ("announce", "told"),
    [
        ("example.org", "/dns/example.org/tcp/4001"),
        ("example.org:5001", "/dns/example.org/tcp/5001"),
        ("2001:db8::1", "/ip6/2001:db8::1/tcp/4001"),
        ("[2001:db8::1]:5001", "/ip6/2001:db8::1/tcp/5001"),
        ("/ip6/2001:db8::1/tcp/5001", "/ip6/2001:db8::1/tcp/5001"),
    ],
)
def test_names_and_each_spelling_are_announced(announce: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_check_free", lambda *_: None)
    monkeypatch.setattr(daemon, "looked_up", lambda host: ("192.0.2.9",) if host == "example.org" else (host,))
    found = daemon_addresses("192.0.2.7", 4001, announce)
    assert found.announced == told
    assert found.udp == told.replace("/dns/example.org", "/ip4/192.0.2.9").replace("/tcp/", "/udp/") + "/quic-v1"

from __future__ import annotations

import socket

import pytest

from dht.daemon import listen_address
from protocol.errors import ConfigError, UnavailableError


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

"""A home router that opens ports when it is asked to (NAT-PMP, RFC 6886), with iptables; for `tests.support.nat`.

python -m tests.support.nat_pmp OUTSIDE_ADDRESS INSIDE_ADDRESS
"""
# ruff: noqa: S607 - which `iptables` is the machine's business

from __future__ import annotations

import ipaddress
import socket
import struct
import subprocess
import sys
import time

PORT = 5351
REQUEST = struct.Struct("!BBHHHI")
PROTOCOLS = {1: "udp", 2: "tcp"}
ANSWER = 128


def main() -> None:
    """The command line: see the top of this file."""
    outside, inside = sys.argv[1:]
    began = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((inside, PORT))
        while True:
            request, client = server.recvfrom(64)
            answer = _answer(request, client[0], outside, int(time.monotonic() - began))
            if answer:
                server.sendto(answer, client)


def _answer(request: bytes, client: str, outside: str, epoch_s: int) -> bytes:
    if request == b"\0\0":
        return struct.pack("!BBHI", 0, ANSWER, 0, epoch_s) + ipaddress.IPv4Address(outside).packed
    if len(request) != REQUEST.size:
        return b""
    _, operation, _, port, _, lifetime_s = REQUEST.unpack(request)
    if lifetime_s and operation in PROTOCOLS:
        _open(PROTOCOLS[operation], port, client)
    return struct.pack("!BBHIHHI", 0, ANSWER + operation, 0, epoch_s, port, port, lifetime_s)


def _open(protocol: str, port: int, client: str) -> None:
    for rule in (
        f"-t nat -A PREROUTING -i eth0 -p {protocol} --dport {port} -j DNAT --to-destination {client}:{port}",
        f"-A FORWARD -p {protocol} -d {client} --dport {port} -j ACCEPT",
    ):
        subprocess.run(["iptables", *rule.split()], check=True, timeout=10)
    sys.stdout.write(f"{protocol} {port}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Homes behind NATs and a public network between them, in network namespaces of this machine. Needs root, ip, iptables.

    public (a bridge, 11.9.0.0/24) ---- each public node in a namespace of its own, 11.9.0.10 and up
       |            |
     router A     router B              masquerade; nothing comes in that was not asked for
       |            |
     home A       home B                192.168.K.2

Nothing leads to the machine's own network.
"""

# ruff: noqa: S607 - which `ip` is the machine's business

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BRIDGE = "br0"
PUBLIC = "11.9.0"
COMMAND_TIMEOUT_S = 10.0


PACKAGES = {"ip": "iproute2", "tc": "iproute2", "iptables": "iptables"}
"""Programs that the tests run, and Debian's packages of them."""


def missing() -> str:
    """Why no namespaces can be made here, in one sentence that says what to do; empty if they can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "make nat-test makes network namespaces, which needs root: run it with sudo"
    absent = [program for program in PACKAGES if shutil.which(program) is None]
    if absent:
        packages = " ".join(sorted({PACKAGES[program] for program in absent}))
        return f"make nat-test needs {', '.join(absent)}: install {packages} (Debian: apt-get install {packages})"
    probe = f"kh{os.getpid()}p"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    _ip("netns", "delete", probe, check=False)
    why = made.stderr.strip()
    return f"make nat-test cannot make a network namespace here (ip netns add: {why})" if made.returncode else ""


class Network:
    """Namespaces by the names that a test gives them."""

    def __init__(self) -> None:
        self._prefix = f"kh{os.getpid()}"
        self._made: list[str] = []
        self._addresses: dict[tuple[str, str], str] = {}
        self._public_hosts = 10
        self._namespace("public")
        self._in("public", "ip", "link", "add", BRIDGE, "type", "bridge")
        self._in("public", "ip", "link", "set", BRIDGE, "up")

    def public(self, name: str) -> str:
        """A namespace on the public network; its address."""
        self._namespace(name)
        return self._attach(name)

    def home(self, name: str, *, symmetric: bool = False) -> str:
        """A namespace behind a router of its own that masquerades; the router's address on the public network.

        A `symmetric` one takes another port for each connection, so that nobody can tell where to dial it.
        """
        router = f"{name}-nat"
        self._namespace(router)
        self._namespace(name)
        outside = self._attach(router)
        net = f"192.168.{len(self._made)}"
        self._link(router, "in0", name, "eth0")
        self._in(router, "ip", "addr", "add", f"{net}.1/24", "dev", "in0")
        self._addresses[router, "in0"] = f"{net}.1"
        self._in(name, "ip", "addr", "add", f"{net}.2/24", "dev", "eth0")
        self._in(name, "ip", "route", "add", "default", "via", f"{net}.1")
        self._in(router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for rule in (
            f"-t nat -A POSTROUTING -o eth0 -j MASQUERADE{' --random' if symmetric else ''}",
            "-P FORWARD DROP",
            "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
            "-A FORWARD -i in0 -j ACCEPT",
            "-A INPUT -i eth0 -m conntrack --ctstate NEW -j DROP",
        ):
            self._in(router, "iptables", *rule.split())
        return outside

    def renumber(self, name: str) -> str:
        """Give a public node another address in place of its own, as a new lease does; that address."""
        self._public_hosts += 1
        address, before = f"{PUBLIC}.{self._public_hosts}", self._addresses[name, "eth0"]
        self._in(name, "ip", "addr", "del", f"{before}/24", "dev", "eth0")
        self._in(name, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
        self._addresses[name, "eth0"] = address
        return address

    def slow(self, name: str, rate: str) -> None:
        """From now on a node sends no faster than `rate`, which is spelt as `tc` does."""
        shape = ("root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
        self._in(name, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def full_speed(self, name: str) -> None:
        """Undo `slow`."""
        self._in(name, "tc", "qdisc", "delete", "dev", "eth0", "root")

    def block_udp(self, home: str) -> None:
        """From now on the home's router lets no UDP out, as some companies' do."""
        self._in(f"{home}-nat", "iptables", "-I", "FORWARD", "-p", "udp", "-j", "DROP")

    def opens_ports(self, home: str) -> subprocess.Popen[str]:
        """From now on, until the process ends, the home's router opens the ports that it is asked for."""
        inside, outside = (self._addresses[f"{home}-nat", link] for link in ("in0", "eth0"))
        program = (sys.executable, "-m", "tests.support.nat_pmp", outside, inside)
        return subprocess.Popen([*self.inside(f"{home}-nat"), *program], stdout=subprocess.PIPE, text=True)

    def inside(self, name: str) -> tuple[str, ...]:
        """What to put in front of a command that is to run there."""
        return ("ip", "netns", "exec", self._full(name))

    def close(self) -> None:
        """Remove every namespace, and what was in it."""
        for name in reversed(self._made):
            _ip("netns", "delete", self._full(name), check=False)

    def _namespace(self, name: str) -> None:
        _ip("netns", "add", self._full(name))
        self._made.append(name)
        self._in(name, "ip", "link", "set", "lo", "up")

    def _attach(self, name: str) -> str:
        address, port = f"{PUBLIC}.{self._public_hosts}", f"p{self._public_hosts}"
        self._public_hosts += 1
        self._link("public", port, name, "eth0")
        self._in("public", "ip", "link", "set", port, "master", BRIDGE)
        self._in(name, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
        self._addresses[name, "eth0"] = address
        return address

    def _link(self, one: str, one_end: str, other: str, other_end: str) -> None:
        ends = (one_end, "netns", self._full(one), "type", "veth", "peer", "name", other_end)
        _ip("link", "add", *ends, "netns", self._full(other))
        self._in(one, "ip", "link", "set", one_end, "up")
        self._in(other, "ip", "link", "set", other_end, "up")

    def _in(self, name: str, *command: str) -> None:
        subprocess.run([*self.inside(name), *command], check=True, timeout=COMMAND_TIMEOUT_S)

    def _full(self, name: str) -> str:
        return f"{self._prefix}-{name}"


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Removed at the end, with whatever still runs in it cut off."""
    made = Network()
    try:
        yield made
    finally:
        made.close()


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=not check, timeout=COMMAND_TIMEOUT_S)

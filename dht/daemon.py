"""The p2pd process: libp2p's connections for one node, the DHT's only extra process.

We start it ourselves instead of letting hivemind do it, for three reasons: a session of its own, so that Ctrl+C in a
terminal does not take the DHT away while the node still has to withdraw its records; its exit is seen, so that it can
be started again; and its key and sockets lie in a folder that nobody else can open. When the node is killed
(`kill -9`), p2pd ends by itself as soon as the control connection closes.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import ipaddress
import logging
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from common.errors import ConfigError, UnavailableError
from dht.addresses import cannot_listen, is_own, looked_up
from dht.child_process import ChildProcess
from dht.socket_folder import SocketFolder, remove_stale_folders
from protocol.addresses import split_flag, tcp_multiaddress

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.identity import Identity

logger = logging.getLogger(__name__)

READY_LINE = "Peer ID:"
IDLE_TIMEOUT_S = 10
"""p2pd ends by itself if no node takes control of it within this time."""

PROXY_VARIABLES = frozenset({"http_proxy", "https_proxy", "all_proxy"})
STOP_TIMEOUT_S = 1.5
MAX_LOG_LINE_CHARS = 500


class DaemonOutput:
    """What p2pd says: `ready` is set once it takes orders, `last_line` tells why it does not."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.last_line = ""

    def hear(self, line: str) -> None:
        """Take one line."""
        if line.startswith(READY_LINE):
            self.ready.set()
        if line:
            self.last_line = line[:MAX_LOG_LINE_CHARS]
            logger.debug("p2pd: %s", self.last_line)


class Daemon:
    """A running p2pd, made by `spawn`.

    `control_socket` is the multiaddress at which it takes orders, `client_socket` the one at which the node takes the
    streams that peers open.
    """

    def __init__(self, process: ChildProcess, folder: SocketFolder, output: DaemonOutput) -> None:
        self._process, self._folder, self._output = process, folder, output
        self.control_socket = folder.control_socket
        self.client_socket = folder.client_socket

    @classmethod
    async def spawn(cls, identity: Identity, place: DaemonAddresses, timeout_s: float) -> Daemon:
        """Start p2pd with the node's key.

        Raises:
            UnavailableError: it cannot be started or is not ready within `timeout_s`.
            ConfigError: there is no folder for its sockets.
        """
        remove_stale_folders()
        folder = SocketFolder()
        try:
            output = DaemonOutput()
            daemon = cls(_launch(identity, place, folder, output.hear), folder, output)
        except BaseException:  # no folder stays
            folder.remove()
            raise
        try:
            await daemon._wait_until_ready(timeout_s)
        except BaseException:  # cancelled, too: no process stays
            await daemon.stop()
            raise
        return daemon

    @property
    def pid(self) -> int:
        """Process id of p2pd."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while p2pd runs."""
        return self._process.exit_code

    async def ended(self) -> int:
        """Wait until p2pd has ended, by itself or not; its exit code."""
        return await self._process.wait()

    async def stop(self) -> None:
        """End p2pd, by force if it has to be; bounded by twice STOP_TIMEOUT_S. Safe to call twice."""
        self._process.terminate()
        try:
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes just as the process ends.
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        finally:
            self._folder.remove()

    async def _wait_until_ready(self, timeout_s: float) -> None:
        ended = asyncio.create_task(self._process.wait())
        started = asyncio.create_task(self._output.ready.wait())
        try:
            await asyncio.wait({ended, started}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            started.cancel()
            self._folder.key_file.unlink(missing_ok=True)  # read by now, or never
        if not self._output.ready.is_set():
            raise UnavailableError(f"p2pd did not start: {self._output.last_line or f'no answer in {timeout_s} s'}")


def listen_address(host: str, port: int) -> str:
    """Multiaddress for an IP address and port; raises ConfigError for a host name, a bad port or one that is taken."""
    if not 0 <= port <= 65_535:  # noqa: PLR2004
        raise ConfigError(f"port: must be from 0 (any) to 65535, is {port}")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"listen: must be an IP address such as 127.0.0.1, is {host[:80]!r}") from None
    if address.is_unspecified:
        raise ConfigError(f"listen: {host} is announced to others, who cannot call it; give this machine's own address")
    version = address.version
    _check_free(host, port, socket.AF_INET if version == 4 else socket.AF_INET6)  # noqa: PLR2004
    return f"/ip{version}/{host}/tcp/{port}"


def is_free(host: str, port: int) -> bool:
    """Whether nothing listens there; raises as `listen_address` for an address that is not this machine's."""
    try:
        listen_address(host, port)
    except UnavailableError:
        if is_own(host):
            return False
        raise
    return True


def check_still_free(place: DaemonAddresses) -> None:
    """Raise UnavailableError if something listens at the TCP address of a p2pd that is to be started again."""
    _, _, host, _, port = place.listen[0].split("/")[:5]
    listen_address(host, int(port))


class DaemonAddresses(NamedTuple):
    """Multiaddresses at which p2pd listens, and that it tells to others; `udp` is where it takes QUIC, if it does.

    QUIC is for those behind NATs, who need it to find direct ways, and is told to nobody else: a peer that has died
    refuses a TCP connection at once, and lets one over UDP wait for seconds.
    """

    listen: tuple[str, ...]
    announced: str = ""
    udp: str = ""

    def with_port_of(self, address: str) -> DaemonAddresses:
        """Return these with the TCP port of `address`, where a restart is to listen, if any port was asked for."""
        if not self.listen[0].endswith("/tcp/0"):
            return self
        return self._replace(listen=(address.partition("/p2p/")[0], *self.listen[1:]))


def daemon_addresses(host: str, port: int, announce: str) -> DaemonAddresses:
    """Where p2pd listens, and is dialled at the IP address `announce` if that is given. Raises as `listen_address`."""
    tcp = listen_address(host, port)
    if ipaddress.ip_address(host).is_loopback:
        return DaemonAddresses((tcp,), announced_address(announce, port))
    if not port and not announce:
        tcp = listen_address(host, _free_port(host))
    announced = announced_address(announce, port) or tcp
    return DaemonAddresses((tcp, udp_address(tcp)), announced, udp_address(_numeric(announced)))


def _numeric(multiaddress: str) -> str:
    """The address of a name, which relays are told by; as it is if nobody knows that name."""
    _, _, host, _, port = multiaddress.split("/")
    return tcp_multiaddress(next(iter(looked_up(host)), host), int(port))


def announced_address(announce: str, port: int) -> str:
    """Multiaddress at which others dial `port`; empty if that is where this node listens. Raises ConfigError."""
    if not announce:
        return ""
    host, announced_port = split_flag("--announce", announce)
    if not port:
        raise ConfigError("--announce: needs a --dht-port too, the one that the router forwards")
    return tcp_multiaddress(host, announced_port or port)


def udp_address(tcp: str) -> str:
    """Return the same address and port for QUIC."""
    return tcp.replace("/tcp/", "/udp/") + "/quic-v1"


def _free_port(host: str) -> int:
    """One that is told to others must be known before p2pd starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_at_home(listen: str) -> bool:
    address = ipaddress.ip_address(listen.split("/")[2])
    return address.is_private and not address.is_loopback


def _check_free(host: str, port: int, family: socket.AddressFamily) -> None:
    """p2pd would share a taken port with another p2pd without a word (SO_REUSEPORT), and each get half the calls."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an old connection that lingers is no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise cannot_listen(host, port, error) from None


def _launch(
    identity: Identity, place: DaemonAddresses, folder: SocketFolder, heard: Callable[[str], None]
) -> ChildProcess:
    key_file = folder.key_file
    key_file.touch(mode=0o600)
    key_file.write_bytes(identity.private_key_protobuf)
    try:
        return ChildProcess(_arguments(place, folder), _environment(), heard)
    except OSError as error:
        raise UnavailableError(f"p2pd cannot be started: {error}; reinstall hivemind, which brings it") from error


def _environment() -> dict[str, str]:
    """This process's, without proxies: p2pd would ask the router for a port (UPnP) through them."""
    kept = {name: value for name, value in os.environ.items() if name.lower() not in PROXY_VARIABLES}
    return {**kept, "GOLOG_LOG_LEVEL": os.environ.get("GOLOG_LOG_LEVEL", "error")}


def _arguments(place: DaemonAddresses, folder: SocketFolder) -> list[str]:
    program = importlib.resources.files("hivemind.hivemind_cli").joinpath("p2pd")
    return [
        str(program),
        f"-listen={folder.control_socket}",
        f"-hostAddrs={','.join(place.listen)}",
        f"-id={folder.key_file}",
        f"-idleTimeout={IDLE_TIMEOUT_S}s",
        "-dhtServer=1",  # libp2p's own DHT finds the addresses of peers whose ids ours names
        "-connManager=1",
        "-tls=1",
        "-b=0",  # we connect to the initial peers ourselves, one by one
        "-autonat=0",
        # At home p2pd asks for a port that leads to its own (UPnP, NAT-PMP), and finds out by itself if it gets one.
        f"-natPortMap={int(_is_at_home(place.listen[0]))}",
        "-relay=0",
        "-autoRelay=0",
        *([f"-announceAddrs={place.announced}"] if place.announced else []),
    ]

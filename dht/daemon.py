"""The p2pd process: libp2p's connections for one node, the DHT's only extra process.

We start it ourselves instead of letting hivemind do it, for three reasons: a session of its own, so that Ctrl+C in a
terminal does not take the DHT away while the node still has to withdraw its records; its exit is seen, so that it can
be started again; and its key and sockets lie in a folder that nobody else can open. When the node is killed
(`kill -9`), p2pd ends by itself as soon as the control connection closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import ipaddress
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.errors import ConfigError, UnavailableError
from dht.addresses import cannot_listen, is_own, looked_up
from protocol.addresses import split_flag, tcp_multiaddress

if TYPE_CHECKING:
    from protocol.identity import Identity

logger = logging.getLogger(__name__)

READY_LINE = "Peer ID:"
IDLE_TIMEOUT_S = 10
"""p2pd ends by itself if no node takes control of it within this time."""

FOLDER_PREFIX = "kilohive-p2pd-"
CONTROL_SOCKET = "p2pd.sock"
STALE_FOLDER_S = 60.0

MAX_SOCKET_PATH_BYTES = 103
"""The longest path of a unix socket: 108 with the final zero on Linux, 104 on macOS."""

SHORT_FOLDER = Path("/tmp")  # noqa: S108 - only for a folder of mode 0700 with a random name
"""Where the folder goes when the path of the folder for temporary files (TMPDIR) is too long for a socket."""

PROXY_VARIABLES = frozenset({"http_proxy", "https_proxy", "all_proxy"})
STOP_TIMEOUT_S = 1.5
MAX_LOG_LINE_CHARS = 500


class Daemon:
    """A running p2pd, made by `spawn`.

    `control_socket` is the multiaddress at which it takes orders, `client_socket` the one at which the node takes the
    streams that peers open.
    """

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._last_line = ""
        self._log_task: asyncio.Task[None] | None = None
        self.control_socket = _control_socket(folder)
        self.client_socket = f"/unix{folder / 'client.sock'}"

    @classmethod
    async def spawn(cls, identity: Identity, place: DaemonAddresses, timeout_s: float) -> Daemon:
        """Start p2pd with the node's key.

        Raises:
            UnavailableError: it cannot be started or is not ready within `timeout_s`.
        """
        _remove_stale_folders()
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=_folder_of_folders()))  # mode 0700
        try:
            daemon = cls(await _launch(identity, place, folder), folder)
        except BaseException:  # cancelled, too: no folder stays
            shutil.rmtree(folder, ignore_errors=True)
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
        return self._process.returncode

    async def ended(self) -> int:
        """Wait until p2pd has ended, by itself or not; its exit code."""
        return await self._process.wait()

    async def stop(self) -> None:
        """End p2pd, by force if it has to be; bounded by twice STOP_TIMEOUT_S. Safe to call twice."""
        with contextlib.suppress(ProcessLookupError):
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
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._log_task is not None:
            await asyncio.wait({self._log_task}, timeout=STOP_TIMEOUT_S)

    async def _wait_until_ready(self, timeout_s: float) -> None:
        ready = asyncio.Event()
        self._log_task = asyncio.create_task(self._follow_output(ready), name="p2pd output")
        ended = asyncio.create_task(self._process.wait())
        started = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait({ended, started}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            started.cancel()
            _key_file(self._folder).unlink(missing_ok=True)  # read by now, or never
        if not ready.is_set():
            await asyncio.wait({self._log_task}, timeout=0.2)  # its last words
            raise UnavailableError(f"p2pd did not start: {self._last_line or f'no answer in {timeout_s} s'}")

    async def _follow_output(self, ready: asyncio.Event) -> None:
        stdout = self._process.stdout
        while stdout is not None and (line := await _read_line(stdout)):
            if line.startswith(READY_LINE):
                ready.set()
            self._last_line = line
            logger.debug("p2pd: %s", line)


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


async def _launch(identity: Identity, place: DaemonAddresses, folder: Path) -> asyncio.subprocess.Process:
    key_file = _key_file(folder)
    key_file.touch(mode=0o600)
    key_file.write_bytes(identity.private_key_protobuf)
    try:
        return await asyncio.create_subprocess_exec(
            *_arguments(place, folder),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        raise UnavailableError(f"p2pd cannot be started: {error}; reinstall hivemind, which brings it") from error


def _environment() -> dict[str, str]:
    """This process's, without proxies: p2pd would ask the router for a port (UPnP) through them."""
    kept = {name: value for name, value in os.environ.items() if name.lower() not in PROXY_VARIABLES}
    return {**kept, "GOLOG_LOG_LEVEL": os.environ.get("GOLOG_LOG_LEVEL", "error")}


def _arguments(place: DaemonAddresses, folder: Path) -> list[str]:
    program = importlib.resources.files("hivemind.hivemind_cli").joinpath("p2pd")
    return [
        str(program),
        f"-listen={_control_socket(folder)}",
        f"-hostAddrs={','.join(place.listen)}",
        f"-id={_key_file(folder)}",
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


def _folder_of_folders() -> Path:
    """The folder for temporary files, unless its path is too long for that of a socket."""
    folder = Path(tempfile.gettempdir())
    longest = folder / f"{FOLDER_PREFIX}12345678" / "client.sock"
    return folder if len(os.fsencode(longest)) <= MAX_SOCKET_PATH_BYTES else SHORT_FOLDER


def _remove_stale_folders() -> None:
    """A killed node leaves its folder, with sockets that nobody listens at; the next node to start removes it."""
    for folder in _folder_of_folders().glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, in use, or gone by now
            if time.time() - folder.stat().st_mtime > STALE_FOLDER_S:
                _remove_if_dead(folder)


def _remove_if_dead(folder: Path) -> None:
    """Raises OSError for a folder that holds anything but dead sockets."""
    # p2pd's own first, and the node's only if that is dead: a node takes every connection there for a call of p2pd's.
    sockets = sorted(folder.iterdir(), key=lambda path: path.name != CONTROL_SOCKET)
    if all(map(_is_dead_socket, sockets)):
        for path in sockets:
            path.unlink()
        folder.rmdir()


def _is_dead_socket(path: Path) -> bool:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003 - the name of socket's method
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # its queue is full, for one: somebody is there
            return False
    return False


def _control_socket(folder: Path) -> str:
    return f"/unix{folder / CONTROL_SOCKET}"


def _key_file(folder: Path) -> Path:
    return folder / "identity.key"


async def _read_line(stdout: asyncio.StreamReader) -> str:
    """The next line that says something; empty at the end of the output."""
    while True:
        try:
            line = await stdout.readline()
        except ValueError:  # longer than the reader's buffer, which drops it
            continue
        text = line.decode(errors="replace").strip()[:MAX_LOG_LINE_CHARS]
        if text or not line:
            return text

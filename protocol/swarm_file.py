"""`swarm.toml`: what a node needs to find a run. The coordinator writes it; hosts, trainers and `status` read it."""

from __future__ import annotations

import json
import tomllib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import tomli_w

from common.atomic_file import write_atomically
from common.errors import ConfigError
from protocol import limits
from protocol.addresses import peer_multiaddress
from protocol.admission import token_from_hex

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_FILE_BYTES = 65_536
LISTENING_FILE = "listening.json"
MAX_INITIAL_PEERS = 64
MAX_ADDRESS_CHARS = 512
HOW_TO_NAME_A_SWARM = (
    "name the swarm with --join INVITE or --join FILE, from its coordinator, or with run_id and initial_peers in the "
    "file of --config"
)


@dataclass(frozen=True, kw_only=True)
class SwarmFile:
    """A run, the peers through which to reach it and, of a closed run, the token that lets its bearer take part."""

    run_id: str
    initial_peers: tuple[str, ...]
    owner: str = ""
    admission: bytes = field(default=b"", repr=False)

    def write(self, path: Path) -> None:
        """Write atomically, a token for this user's eyes only; raises OSError."""
        table = {**asdict(self), "initial_peers": list(self.initial_peers), "admission": self.admission.hex()}
        if not self.admission:
            del table["admission"]
        write_atomically(path, tomli_w.dumps(table).encode(), mode=0o600 if self.admission else 0o644)

    @classmethod
    def read(cls, path: Path) -> SwarmFile:
        """Read and check every field; raises ConfigError naming the file and what is wrong with it."""
        return cls.parse(_read(path), str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> SwarmFile:
        """Check what the file `where` holds, not more than MAX_FILE_BYTES; raises ConfigError."""
        table = _table(data, where)
        unknown = sorted(table.keys() - {"run_id", "initial_peers", "owner", "admission"})
        if unknown:
            raise ConfigError(f"{where}: {unknown[0]}: unknown field; this swarm may need a newer kilohive")
        owner = table.get("owner", "")
        if not isinstance(owner, str) or len(owner) > MAX_ADDRESS_CHARS:
            raise ConfigError(f"{where}: owner: must be a peer id")
        try:
            return cls(
                run_id=checked_run_id(table.get("run_id")),
                initial_peers=checked_peers(table.get("initial_peers")),
                owner=owner,
                admission=token_from_hex(table.get("admission", "")),
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


@contextmanager
def listening_told(folder: Path, host: str, port: int) -> Iterator[None]:
    """Say in `folder`, while the context lasts, where its DHT node listens, which is not where others dial it."""
    path = folder / LISTENING_FILE
    write_atomically(path, json.dumps({"host": host, "port": port}).encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def last_port(path: Path) -> int:
    """Port of the first address in an earlier file, 0 if there is none: nodes that are up look for this peer there."""
    try:
        parts = SwarmFile.read(path).initial_peers[0].split("/")
    except ConfigError:
        return 0
    port = parts[parts.index("tcp") + 1] if "tcp" in parts[:-1] else ""
    return int(port) if port.isascii() and port.isdigit() else 0


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {HOW_TO_NAME_A_SWARM}") from None


def _table(data: bytes, where: str) -> dict[str, object]:
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{where}: is longer than {MAX_FILE_BYTES} bytes, so it is not a swarm file")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not a swarm file: {error}") from None


def checked_run_id(value: object) -> str:
    """A run id that somebody gave; raises ConfigError."""
    if not isinstance(value, str) or not value:
        raise ConfigError("run_id: must be the name of a run, as its coordinator printed it")
    plain = value.replace("-", "").replace("_", "")
    if len(value) > limits.MAX_RUN_ID_CHARS or not (plain.isascii() and plain.isalnum()):
        raise ConfigError(f"run_id: must be 1 to {limits.MAX_RUN_ID_CHARS} letters, digits, - or _, is {value[:60]!r}")
    return value


def checked_peers(value: object) -> tuple[str, ...]:
    """Initial peers that somebody gave as a list; raises ConfigError."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_INITIAL_PEERS:
        raise ConfigError(f"initial_peers: must be 1 to {MAX_INITIAL_PEERS} multiaddresses")
    return tuple(_peer(address) for address in value)


def _peer(value: object) -> str:
    value = peer_multiaddress(value) if isinstance(value, str) else value
    wanted = "a multiaddress such as /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW..."
    if not isinstance(value, str) or not value.startswith("/") or "/p2p/" not in value:
        raise ConfigError(f"initial_peers: must be {wanted}, is {str(value)[:60]!r}")
    if len(value) > MAX_ADDRESS_CHARS or not value.isascii() or any(char.isspace() for char in value):
        raise ConfigError(f"initial_peers: must be {wanted} of at most {MAX_ADDRESS_CHARS} characters without blanks")
    return value

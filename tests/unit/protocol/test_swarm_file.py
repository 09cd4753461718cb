"""The swarm file survives a round trip, and a damaged one is one sentence for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.atomic_file import write_atomically
from common.errors import ConfigError
from protocol.swarm_file import MAX_FILE_BYTES, SwarmFile

if TYPE_CHECKING:
    from pathlib import Path

PEER = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWBmwkXtQAy2bqbBrAA6XzaGhB8Vu6rSYqZ3yQ3Vdp8Zfn"


def written(path: Path) -> Path:
    SwarmFile(run_id="demo-0123456789ab", initial_peers=(PEER,), owner="12D3KooWowner").write(path)
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = written(tmp_path / "deeper" / "swarm.toml")
    assert SwarmFile.read(path) == SwarmFile(run_id="demo-0123456789ab", initial_peers=(PEER,), owner="12D3KooWowner")
    assert [file.name for file in path.parent.iterdir()] == ["swarm.toml"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = written(tmp_path / "swarm.toml")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["swarm.toml"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run_id = 3", "run_id: must be the name of a run"),
        ("run_id = 'a/b'\ninitial_peers = ['/x/p2p/y']", "run_id: must be 1 to 128 letters"),
        ("run_id = 'a'", "initial_peers: must be 1 to 64 multiaddresses"),
        ("run_id = 'a'\ninitial_peers = []", "initial_peers: must be 1 to 64 multiaddresses"),
        ("run_id = 'a'\ninitial_peers = ['10.0.0.1:4001']", "initial_peers: must be a multiaddress such as"),
        ("run_id = 'a'\ninitial_peers = ['/ip4/1 /p2p/x']", "without blanks"),
        ("run_id = 'a'\ninitial_peers = [7]", "initial_peers: must be a multiaddress such as"),
        ("run_id = 'a'\ncolour = 1", "colour: unknown field"),
        ("run_id = 'a'\nowner = 1", "owner: must be a peer id"),
        ("run_id = 'a'\ninitial_peers = ['/x/p2p/y']\nadmission = 1", "admission: must be 64 hexadecimal digits"),
        ("run_id = 'a'\ninitial_peers = ['/x/p2p/y']\nadmission = '00'", "admission: must be 32 bytes, is 1"),
        ("run_id =", "not a swarm file"),
        ("\0\1", "not a swarm file"),
        ("#" * (MAX_FILE_BYTES + 1), "longer than 65536 bytes"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "swarm.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        SwarmFile.read(path)
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        SwarmFile.read(tmp_path / "none.toml")


def test_a_token_is_read_back_and_its_file_is_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "swarm.toml"
    file = SwarmFile(run_id="demo", initial_peers=(PEER,), admission=bytes(range(32)))
    file.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SwarmFile.read(path) == file
    assert "admission" not in repr(file)


def test_an_open_runs_file_says_nothing_of_tokens_and_can_be_read_by_all(tmp_path: Path) -> None:
    path = written(tmp_path / "swarm.toml")
    assert path.stat().st_mode & 0o777 == 0o644
    assert "admission" not in path.read_text()

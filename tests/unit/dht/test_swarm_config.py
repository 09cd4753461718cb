"""Which swarm is meant: an invite, a file, or flags that win over either."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError
from dht.swarm_config import SwarmChoice, resolve
from protocol.admission import Admission
from protocol.identity import Identity
from protocol.invite import Invite
from protocol.swarm_file import SwarmFile

if TYPE_CHECKING:
    from pathlib import Path

PEER = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWBmwkXtQAy2bqbBrAA6XzaGhB8Vu6rSYqZ3yQ3Vdp8Zfn"
TOKEN = bytes(range(32))
OTHER = "/ip4/127.0.0.2/tcp/4001/p2p/12D3KooWBmwkXtQAy2bqbBrAA6XzaGhB8Vu6rSYqZ3yQ3Vdp8Zfn"
INVITE = Invite(
    run_id="invited-0123456789ab", initial_peers=(OTHER,), owner=Identity.generate().peer_id, expires_s=1_000
).encode()


def swarm_file(folder: Path) -> Path:
    path = folder / "swarm.toml"
    SwarmFile(run_id="demo-0123456789ab", initial_peers=(PEER,), owner="12D3KooWowner").write(path)
    return path


def test_a_file_names_the_run_and_its_peers(tmp_path: Path) -> None:
    assert resolve(SwarmChoice(swarm=swarm_file(tmp_path))) == (Admission("demo-0123456789ab"), (PEER,))


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    choice = SwarmChoice(swarm=swarm_file(tmp_path), initial_peers=(OTHER,))
    assert resolve(choice) == (Admission("demo-0123456789ab"), (OTHER,))


def test_flags_alone_are_enough() -> None:
    assert resolve(SwarmChoice(run_id="demo", initial_peers=(PEER,))) == (Admission("demo"), (PEER,))


@pytest.mark.parametrize("choice", [SwarmChoice(), SwarmChoice(run_id="demo"), SwarmChoice(initial_peers=(PEER,))])
def test_a_configuration_without_a_swarm_says_how_to_name_one(choice: SwarmChoice) -> None:
    with pytest.raises(
        ConfigError, match=r"--join INVITE or --join FILE.* run_id and initial_peers in the file of --config"
    ):
        resolve(choice)


def test_an_invite_is_all_that_is_needed() -> None:
    assert resolve(SwarmChoice(join=INVITE), clock=lambda: 999.0) == (Admission("invited-0123456789ab"), (OTHER,))


def test_flags_win_over_the_invite() -> None:
    choice = SwarmChoice(join=INVITE, initial_peers=(PEER,))
    assert resolve(choice, clock=lambda: 999.0) == (Admission("invited-0123456789ab"), (PEER,))


def test_an_expired_invite_is_refused_whatever_else_is_given() -> None:
    with pytest.raises(ConfigError, match="expired"):
        resolve(SwarmChoice(join=INVITE, run_id="demo", initial_peers=(PEER,)), clock=lambda: 1_000.0)


def test_two_swarms_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--join and --swarm"):
        resolve(SwarmChoice(join=INVITE, swarm=swarm_file(tmp_path)))


def test_a_token_comes_with_the_file_or_the_invite(tmp_path: Path) -> None:
    path = tmp_path / "swarm.toml"
    SwarmFile(run_id="demo", initial_peers=(PEER,), admission=TOKEN).write(path)
    invite = Invite(run_id="demo", initial_peers=(PEER,), owner=Identity.generate().peer_id, admission=TOKEN).encode()
    for choice in (SwarmChoice(swarm=path), SwarmChoice(join=invite), SwarmChoice(swarm=path, initial_peers=(OTHER,))):
        assert resolve(choice)[0] == Admission("demo", TOKEN)


def test_a_token_is_not_used_for_another_run(tmp_path: Path) -> None:
    path = tmp_path / "swarm.toml"
    SwarmFile(run_id="demo", initial_peers=(PEER,), admission=TOKEN).write(path)
    assert resolve(SwarmChoice(swarm=path, run_id="other"))[0] == Admission("other")

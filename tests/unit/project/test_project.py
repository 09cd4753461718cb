"""The files that describe the project agree with each other: dependencies and locks, sources and generated code."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import generated

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = PROJECT["dependencies"]
DEV = PROJECT["optional-dependencies"]["dev"]
LIGHTHOUSE = PROJECT["optional-dependencies"]["lighthouse"]
LOCKS = {
    "requirements.lock": RUNTIME,
    "requirements-dev.lock": RUNTIME + DEV,
    "requirements-lighthouse.lock": RUNTIME + LIGHTHOUSE,
}


def _lines(lock: str) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / lock).read_text().splitlines())
    return [line for line in lines if line]


def _pins(lock: str) -> dict[str, str]:
    return dict(line.split("==") for line in _lines(lock))


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_every_dependency_within_its_range(lock: str) -> None:
    pins = _pins(lock)

    for requirement in map(Requirement, LOCKS[lock]):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, f"run `make lock` for {requirement}"


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_serves_every_machine(lock: str) -> None:
    for line in _lines(lock):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), f"{line}: neither option, address nor local build"
        assert not line.startswith(("nvidia", "cuda", "triton")), f"{line}: only machines with CUDA have it"


def test_the_locks_pin_the_same_versions() -> None:
    dev, lighthouse = _pins("requirements-dev.lock"), _pins("requirements-lighthouse.lock")
    assert _pins("requirements.lock").items() <= dev.items()
    assert {name: dev[name] for name in dev.keys() & lighthouse.keys()}.items() <= lighthouse.items()


def test_generated_code_is_checked_against_its_source(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "protocol", tmp_path / "protocol", ignore=shutil.ignore_patterns("*_pb2*", "__pycache__"))
    generated.generate(tmp_path, tmp_path)
    assert generated.stale(tmp_path) == []

    (tmp_path / "protocol/added.proto").write_text('syntax = "proto3"; message Added {}')
    (tmp_path / "protocol/gone_pb2.py").touch()
    with (tmp_path / "protocol/records.proto").open("a") as proto:
        proto.write("message Added2 {}\n")
    assert generated.stale(tmp_path) == [
        "protocol/added_pb2.py",
        "protocol/added_pb2.pyi",
        "protocol/gone_pb2.py",
        "protocol/records_pb2.py",
        "protocol/records_pb2.pyi",
    ]


def test_a_mistake_in_a_proto_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "protocol").mkdir()
    (tmp_path / "protocol/wrong.proto").write_text('syntax = "proto3"; message {}')

    with pytest.raises(SystemExit, match="protoc failed"):
        generated.generate(tmp_path, tmp_path)

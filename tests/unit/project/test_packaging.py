"""What an installed Kilohive may count on: a Python that it knows, and packages that are its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from typing import TYPE_CHECKING

import pytest
from packaging.specifiers import SpecifierSet

from tests.support.docs import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PACKAGES = {name.partition(".")[0] for name in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
PYTHONS = ("3.11", "3.12", "3.13")
OTHERS = ("3.8", "3.10", "3.14")
AS_ANOTHER_PYTHON = "import runpy, sys; sys.version_info = {version}; runpy.run_path({script!r}, run_name='__main__')"


def test_the_pythons_that_are_named_are_those_that_pip_accepts() -> None:
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert named == list(PYTHONS)
    accepted = SpecifierSet(PROJECT["requires-python"])
    assert [version for version in (*PYTHONS, *OTHERS) if f"{version}.0" in accepted] == list(PYTHONS)


@pytest.mark.parametrize("version", OTHERS)
def test_from_a_checkout_another_python_is_refused_by_one_sentence(version: str) -> None:
    numbers = (*map(int, version.split(".")), 0, "final", 0)
    code = AS_ANOTHER_PYTHON.format(version=numbers, script=str(ROOT / "run_node.py"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: Kilohive needs Python 3\.11, 3\.12 or 3\.13; .*\n", done.stderr)


def test_no_distribution_that_is_installed_beside_it_has_packages_of_the_same_names() -> None:
    theirs = packages_distributions()
    names = PACKAGES | set(PYPROJECT["tool"]["setuptools"]["py-modules"])
    assert names == {"common", "protocol", "dht", "node", "coordinator", "run_node", "kilohive"}
    assert {name: theirs[name] for name in names if set(theirs.get(name, ())) - {"kilohive"}} == {}


def test_every_package_tells_type_checkers_that_it_is_annotated() -> None:
    assert [name for name in sorted(PACKAGES) if not (ROOT / name / "py.typed").exists()] == []


def in_another_folder(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Where Python looks into `folder` first, and for Kilohive after it."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("name", ["common.py", "common/__init__.py", "protocol/__init__.py"])
def test_a_module_of_the_same_name_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    done = in_another_folder(tmp_path, "import kilohive")
    package = name.partition("/")[0].removesuffix(".py")
    told = f"kilohive has a package `{package}`, and Python finds another module of that name first, {tmp_path / name}"
    assert told in done.stderr.splitlines()[-1]


def test_the_command_takes_its_own_packages_whatever_else_python_would_find(tmp_path: Path) -> None:
    (tmp_path / "common.py").touch()
    done = in_another_folder(tmp_path, "import run_node; run_node.main(['--version'])")
    assert done.stdout.startswith("kilohive "), done.stderr

"""One name for one thing: two public classes of the same name would leave a reader to find out which is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = ("common", "protocol", "dht", "node", "coordinator", "experiments")


def public_classes(path: Path) -> list[tuple[str, int]]:
    """Names of a module's public top-level classes, and the lines that they begin on."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [(node.name, node.lineno) for node in body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]


def test_no_two_modules_define_a_public_class_of_the_same_name() -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for name, line in public_classes(path):
                places[name].append(f"{path.relative_to(ROOT)}:{line}")
    assert places, f"no module of {PACKAGES} in {ROOT}"
    assert {name: found for name, found in places.items() if len(found) > 1} == {}

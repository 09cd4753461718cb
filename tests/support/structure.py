"""Prints the rooms of the product, the arrows between them and every circle; fails where there is more than agreed.

    python -m tests.support.structure [--check]

A room is a folder of LAYOUT with everything below it that is no room of its own. An arrow is an import, for types too,
from some file of one room to some file of another. docs/rooms.md says what each room may import and why.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "protocol", "dht", "node", "coordinator")
NESTED = ("dht.relay", "coordinator.credit", "coordinator.lighthouse")
MAX_ROOMS_OF_NODE = 14
MAX_ARROWS_OF_NODE = 63
APART = (("node.host", "node.trainer"), ("node.trainer", "node.host"))

Arrow = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """`files` counts each room's files, `arrows` the imports that each arrow stands for."""

    files: Counter[str]
    arrows: Counter[Arrow]

    @property
    def rooms_of_node(self) -> list[str]:
        """The folders directly below `node/`."""
        return sorted(room for room in self.files if room.startswith("node."))

    @property
    def arrows_of_node(self) -> list[Arrow]:
        """The arrows that begin in a room of `node/`, wherever they end."""
        return sorted(arrow for arrow in self.arrows if arrow[0] in self.rooms_of_node)

    def circle(self) -> list[str]:
        """Rooms that import each other in a circle; empty if there are none."""
        sorter: TopologicalSorter[str] = TopologicalSorter()
        for source, target in self.arrows:
            sorter.add(source, target)
        try:
            sorter.prepare()
        except CycleError as error:
            return list(error.args[1])
        return []

    def faults(self) -> list[str]:
        """A sentence for each thing that is not as agreed."""
        rooms, arrows, circle = self.rooms_of_node, self.arrows_of_node, self.circle()
        found = [
            f"{source} imports {target}: they stay apart" for source, target in APART if self.arrows[source, target]
        ]
        if len(rooms) > MAX_ROOMS_OF_NODE:
            found.append(f"node/ has {len(rooms)} rooms, more than {MAX_ROOMS_OF_NODE}")
        if len(arrows) > MAX_ARROWS_OF_NODE:
            found.append(f"{len(arrows)} arrows leave the rooms of node/, more than {MAX_ARROWS_OF_NODE}")
        if circle:
            found.append(f"rooms import each other in a circle: {' -> '.join(circle)}")
        return found


def measured(root: Path = ROOT) -> Structure:
    """The structure of the checkout at `root`, from its imports; nothing of the project is run."""
    sys.path.insert(0, str(root))
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    names = {name: _room(name, root) for name in graph.modules}
    files = Counter(room for name, room in names.items() if not _is_package(name, root))
    arrows: Counter[Arrow] = Counter()
    for name, room in names.items():
        for imported in graph.find_modules_directly_imported_by(name):
            if names[imported] != room:
                arrows[room, names[imported]] += 1
    return Structure(files=files, arrows=arrows)


def _room(module: str, root: Path) -> str:
    nested = next((name for name in NESTED if f"{module}.".startswith(f"{name}.")), None)
    if nested is not None:
        return nested
    package, _, rest = module.partition(".")
    if package != "node" or not rest:
        return package
    room = f"{package}.{rest.partition('.')[0]}"
    return room if _is_package(room, root) else package


def _is_package(module: str, root: Path) -> bool:
    return root.joinpath(*module.split(".")).is_dir()


def _print(structure: Structure) -> None:
    targets: dict[str, list[str]] = {room: [] for room in sorted(structure.files)}
    for (source, target), n_imports in sorted(structure.arrows.items()):
        targets[source].append(f"{target} ({n_imports})")
    for room, of_room in targets.items():
        folder = f"{room.replace('.', '/')}/"
        print(f"{folder:<24}{structure.files[room]:>3} files -> {', '.join(of_room) or 'nothing'}")
    print(
        f"\n{len(structure.rooms_of_node)} rooms in node/, {len(structure.arrows_of_node)} arrows from them "
        f"({len(structure.arrows)} in the product), {1 if structure.circle() else 0} circles"
    )


def main() -> None:
    """The command line: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the structure is not as agreed")
    structure = measured()
    _print(structure)
    if parser.parse_args().check and (faults := structure.faults()):
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()

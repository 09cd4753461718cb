"""Generates `*_pb2.py` and `.pyi` beside each `.proto` file of FOLDERS, or checks that those committed are current.

    python -m tests.support.generated [--check]

Nothing is generated for the services: they are a few calls each, bound by hand with their types where they are served.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("protocol", "coordinator/lighthouse")


def generate(root: Path, out: Path) -> None:
    """Writes the code of every `.proto` file below `out`, so that it is imported as `protocol.NAME_pb2` and the like.

    Raises:
        SystemExit: protoc found a mistake in a .proto file, and has printed it.
    """
    protos = sorted(str(path.relative_to(root)) for folder in FOLDERS for path in (root / folder).glob("*.proto"))
    well_known = Path(next(iter(grpc_tools.__path__))) / "_proto"
    arguments = [f"-I{root}", f"-I{well_known}", f"--python_out={out}", f"--pyi_out={out}", "--fatal_warnings", *protos]
    if not protos or protoc.main(["protoc", *arguments]) != 0:
        sys.exit("protoc failed: see above" if protos else f"no .proto file in {root}")


def stale(root: Path) -> list[str]:
    """Names each generated file below `root` that is missing, differs from its source, or has no source any more."""
    with tempfile.TemporaryDirectory() as folder:
        generate(root, Path(folder))
        fresh = _generated(Path(folder))
    committed = _generated(root)
    return sorted(str(name) for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))


def _generated(root: Path) -> dict[Path, bytes]:
    paths = (path for folder in FOLDERS for path in (root / folder).glob("*_pb2*.py*"))
    return {path.relative_to(root): path.read_bytes() for path in paths}


def main() -> None:
    """The command line: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a generated file is not current")
    if not parser.parse_args().check:
        generate(ROOT, ROOT)
    elif wrong := stale(ROOT):
        sys.exit(f"not what its .proto file says, run `make proto`: {', '.join(wrong)}")


if __name__ == "__main__":
    main()

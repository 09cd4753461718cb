"""What a person types to get to the subcommands, for help pages and for the commands that a node tells its owner."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

COMMAND, SCRIPT = "kilohive", "run_node.py"
PASSING_ENVIRONMENTS = {"archive-v": "uvx", "environments-v": "uvx", ".cache": "pipx run"}
"""What the folder is called in which a runner keeps environments that it makes and forgets by itself."""


def program_name() -> str:
    """`python run_node.py` in a checkout; else `kilohive`, or its path or runner where that is not found."""
    program = Path(sys.argv[0])
    if program.name == SCRIPT and not program.resolve().is_relative_to(sys.prefix):
        return f"python {SCRIPT}"
    if program.name not in {SCRIPT, COMMAND}:  # some other program that uses these modules
        return COMMAND
    environments = Path(sys.prefix).parent.name
    for name, runner in PASSING_ENVIRONMENTS.items():
        if environments.startswith(name):
            return f"{runner} {COMMAND}"
    # Nodes that `local` starts are the script of an installed package: beside their Python is the command.
    return _shortest(Path(sys.executable).with_name(COMMAND) if program.name == SCRIPT else program)


def _shortest(program: Path) -> str:
    found = shutil.which(COMMAND)
    if found is not None and program.exists() and Path(found).samefile(program):
        return COMMAND
    return shlex.quote(str(program))

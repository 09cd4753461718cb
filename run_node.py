"""The command `kilohive`: one subcommand per role, and what they share (logging, exit codes).

    python run_node.py local --hosts 4 --experts 1024      a whole swarm on this machine
    python run_node.py host --join runs/local/swarm.toml  host experts for a run

Exit codes: 0 done (for host, coordinator and lighthouse: left cleanly), 1 failed, 2 a mistake on the command line or in
a file, 130 interrupted before its work was done, after a clean stop.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# Here, since another Python cannot read what is imported below.
if not (3, 11) <= sys.version_info < (3, 14):
    sys.stderr.write(
        f"error: Kilohive needs Python 3.11, 3.12 or 3.13; {sys.executable} is {sys.version.split()[0]}: "
        "install one of these and start it with that\n"
    )
    sys.exit(2)
# A PYTHONPATH may name packages of the same names as ours, such as `common`.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from common.command_line import (
    HELP_LIMITS,
    HELP_SETTINGS,
    HelpPage,
    parse,
    print_help,
    print_settings,
    resolved_text,
)
from common.errors import ConfigError, KilohiveError
from common.open_files import raise_open_files_limit
from common.program import program_name
from common.role import EXIT_INTERRUPTED, exit_at_interrupts, run_on_trio, run_on_uvloop
from common.standard_streams import open_standard_streams
from common.utf8_mode import start_again_if_needed
from coordinator.config import (
    CoordinatorConfig,
    ExperimentConfig,
    LocalConfig,
    StatusConfig,
)
from coordinator.credit.config import CreditConfig
from coordinator.dashboard.config import DashboardConfig
from coordinator.lighthouse.config import LighthouseConfig
from node.api.config import ServeConfig
from node.contributor.config import ContributeConfig
from node.export.config import ExportConfig
from node.host.config import ControlConfig, HostConfig, PageConfig, PauseConfig
from node.limits.config import LimitsConfig
from node.rpc.config import HealthConfig
from node.trainer.config import (
    CacheConfig,
    EvaluateConfig,
    InspectConfig,
    SampleConfig,
    TokenizerConfig,
    TrainConfig,
)
from protocol.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.role import Role

logger = logging.getLogger("kilohive")

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 a mistake on the command line or in a file, 130 interrupted."


@dataclass(frozen=True, kw_only=True)
class Command(HelpPage[Any]):
    """A subcommand: its help page and, as "module:function", its role.

    The module is imported when the command is run: torch and hivemind take seconds, `--help` should not.
    `endless`: its work has no end, so a clean stop is its success. `on_trio`: its role is one of trio's.
    """

    entry: str
    endless: bool = False
    on_trio: bool = False

    def load(self) -> Role:
        """Import the role. Raises ConfigError where that needs what is not installed."""
        if self.on_trio and importlib.util.find_spec("trio") is None:
            raise ConfigError(
                f"{self.name} needs libp2p: install kilohive[lighthouse], in a checkout with make setup-lighthouse"
            )
        name, _, function = self.entry.partition(":")
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
            raise ConfigError(
                f"{self.name} is not in the installed package: run it in a checkout of the source"
            ) from None
        role: Role = getattr(module, function)
        return role


COMMANDS = (
    Command(
        name="local",
        summary="train a whole swarm on this machine, each node a process of its own.",
        config=LocalConfig,
        examples=("local", "local --hosts 2 --experts 256 --steps 100 --out runs/small", "local --resume"),
        entry="coordinator.local:run_local",
    ),
    Command(
        name="host",
        summary="host blocks of experts for a run.",
        config=HostConfig,
        examples=("host --join invite.txt", "host --join swarm.toml --blocks 0/0-3,1/7 --state state/b"),
        limits=LimitsConfig,
        entry="node.host.command:run_host",
        endless=True,
    ),
    Command(
        name="train",
        summary="train a run's trunk over the swarm's experts.",
        config=TrainConfig,
        examples=("train --join runs/run/swarm.toml --steps 500", "train --join runs/run/swarm.toml --resume"),
        entry="node.trainer.trainer:run_trainer",
    ),
    Command(
        name="coordinator",
        summary="create or reopen a run, and be its first peer.",
        config=CoordinatorConfig,
        examples=("coordinator --out runs/run --experts 256 --dht-port 4001",),
        entry="coordinator.coordinator:run_coordinator",
        endless=True,
    ),
    Command(
        name="lighthouse",
        summary="be a run's first peer, its relay and its observer.",
        config=LighthouseConfig,
        examples=(
            "lighthouse --join runs/run/swarm.toml",
            "lighthouse --join invite.txt --port 4001 --max-circuits 8",
        ),
        entry="coordinator.lighthouse.role:run_lighthouse",
        endless=True,
        on_trio=True,
    ),
    Command(
        name="status",
        summary="show a swarm's peers, blocks and load, from its DHT alone.",
        config=StatusConfig,
        examples=("status --join runs/local/swarm.toml", "status --join runs/local/swarm.toml --json"),
        entry="coordinator.status:run_status",
    ),
    Command(
        name="credit",
        summary="collect a run's receipts, and show what hosts and trainers have earned.",
        config=CreditConfig,
        examples=(
            "credit --join runs/local/swarm.toml",
            "credit --join invite.txt --out runs/credit --csv credit.csv",
        ),
        entry="coordinator.credit.command:run_credit",
    ),
    Command(
        name="dashboard",
        summary="show a run in the browser, live and over time, from its DHT alone.",
        config=DashboardConfig,
        examples=(
            "dashboard --join runs/local/swarm.toml",
            "dashboard --join invite.txt --listen 0.0.0.0 --key-file page.key",
        ),
        entry="coordinator.dashboard.command:run_dashboard",
        endless=True,
    ),
    Command(
        name="health",
        summary="ask the node of a folder on this machine whether it serves.",
        config=HealthConfig,
        examples=("health", "health --state runs/run"),
        entry="node.rpc.health:run_health",
    ),
    Command(
        name="pause",
        summary="have the host of a folder on this machine stop working; it stays in the swarm.",
        config=PauseConfig,
        examples=("pause 1h", "pause --state state/b"),
        entry="node.host.control:run_pause",
    ),
    Command(
        name="resume",
        summary="have a paused host work again.",
        config=ControlConfig,
        examples=("resume", "resume --state state/b"),
        entry="node.host.control:run_resume",
    ),
    Command(
        name="leave",
        summary="have a host hand its blocks over, leave the swarm and end, within 20 s.",
        config=ControlConfig,
        examples=("leave", "leave --state state/b"),
        entry="node.host.control:run_leave",
    ),
    Command(
        name="page",
        summary="show what the host of a folder on this machine does to its owner, who sets its limits there.",
        config=PageConfig,
        examples=("page", "page --state state/b"),
        entry="node.host.page.command:run_page",
        endless=True,
    ),
    Command(
        name="evaluate",
        summary="measure held-out bits per byte of a run that is up.",
        config=EvaluateConfig,
        examples=("evaluate --join runs/local/swarm.toml", "evaluate --join invite.txt --out runs/train"),
        entry="node.trainer.evaluation:run_evaluate",
    ),
    Command(
        name="inspect",
        summary="show what the experts of a trained model have learnt, on held-out text.",
        config=InspectConfig,
        examples=(
            "inspect --export models/run",
            "inspect --export models/run --data texts --json experts.json",
        ),
        entry="node.trainer.inspection.command:run_inspect",
    ),
    Command(
        name="sample",
        summary="let the model of a run that is up write text.",
        config=SampleConfig,
        examples=(
            'sample --join runs/local/swarm.toml --prompt "The city "',
            'sample --join runs/local/swarm.toml --top-p 0.9 --stop "." --n 3',
        ),
        entry="node.trainer.sample_command:run_sample",
    ),
    Command(
        name="serve",
        summary="serve the model of a run that is up over HTTP, to OpenAI's clients.",
        config=ServeConfig,
        examples=(
            "serve --join runs/local/swarm.toml",
            "serve --join invite.txt --listen 0.0.0.0 --key-file serve.key",
        ),
        entry="node.api.serve_command:run_serve",
        endless=True,
    ),
    Command(
        name="contribute",
        summary="offer an expert trained at home; taken in if it is tested and gains.",
        config=ContributeConfig,
        examples=(
            "contribute --layer 1 --expert 7 --train 500 --join invite.txt",
            "contribute --layer 1 --expert 7 --join invite.txt",
        ),
        entry="node.contributor.command:run_contribute",
    ),
    Command(
        name="export",
        summary="write a run's model to a folder that transformers loads.",
        config=ExportConfig,
        examples=("export --join invite.txt --out models/run", "export --join invite.txt --trunk runs/train"),
        entry="node.export.command:run_export",
    ),
    Command(
        name="tokenizer",
        summary="train a tokenizer on text, for a run to come.",
        config=TokenizerConfig,
        examples=("tokenizer --data texts --vocab-size 8192 --out tokenizer.json",),
        entry="node.trainer.tokenizer_command:run_tokenizer",
    ),
    Command(
        name="cache",
        summary="show or empty this machine's cache of text, tokenizers and models.",
        config=CacheConfig,
        examples=("cache", "cache --clear"),
        entry="node.trainer.cache_command:run_cache",
    ),
    Command(
        name="experiment",
        summary="put a claim about tiny experts to the test.",
        config=ExperimentConfig,
        examples=("experiment", "experiment granularity", "experiment granularity --preset full --jobs 2"),
        entry="experiments.harness.run:run_experiment",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    exit_at_interrupts()
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except KilohiveError as error:
        _print_error(str(error))
        return error.exit_code
    except OSError as error:
        _print_error(f"{error.filename or 'system'}: {error.strerror or error}")
        return EXIT_FAILED
    except BaseExceptionGroup as group:
        user_errors, bugs = group.split(KilohiveError)
        if user_errors is None or bugs is not None:
            raise
        leaves = _leaves(user_errors)
        for leaf in leaves:
            _print_error(str(leaf))
        return max(leaf.exit_code for leaf in leaves)


def _main(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in {"-h", "--help", "help"}:
        _print_overview(Console())
        return EXIT_OK if arguments else EXIT_USAGE
    if name == "--version":
        sys.stdout.write(f"kilohive {VERSION}\n")
        return EXIT_OK
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        raise ConfigError(f"no command {name!r}; it is one of {', '.join(command.name for command in COMMANDS)}")
    if {"-h", "--help"} & set(arguments[1:]):
        print_help(command, Console(), program_name())
        return EXIT_OK
    if HELP_SETTINGS in arguments[1:] or (command.limits and HELP_LIMITS in arguments[1:]):
        print_settings(command, Console(), program_name())
        return EXIT_OK
    return _run(command, arguments[1:])


def _run(command: Command, arguments: list[str]) -> int:
    parsed = parse(command, arguments, program_name())
    console = Console(stderr=True)
    _set_up_logging(parsed.log_level, console)
    raise_open_files_limit()
    if logger.isEnabledFor(logging.INFO):
        console.print(resolved_text(command, parsed), soft_wrap=not console.is_terminal)
    run = run_on_trio if command.on_trio else run_on_uvloop
    end = run(command.load, parsed.config, stop_on_stdin_eof=parsed.stop_on_stdin_eof)
    if end.code is not None:
        return end.code
    return EXIT_INTERRUPTED if end.was_stopped and not command.endless else EXIT_OK


def _set_up_logging(level: str, console: Console) -> None:
    """Colours on a terminal; one whole line per record in a file."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]", omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _print_error(message: str) -> None:
    text = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True).print(text, soft_wrap=True)


def _leaves(group: BaseExceptionGroup[KilohiveError]) -> list[KilohiveError]:
    return [leaf for e in group.exceptions for leaf in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


def _print_overview(console: Console) -> None:
    program = program_name()
    console.print(f"[bold]kilohive {VERSION}[/]: train a mixture-of-experts model over volunteers' machines\n")
    console.print(Text(f"  {program} COMMAND [FLAGS]", style="cyan"), "\n")
    grid = Table.grid(padding=(0, 2))
    for command in COMMANDS:
        grid.add_row(Text(f"  {command.name}", style="bold"), command.summary.rstrip("."))
    console.print(grid)
    console.print(f"\nEach command has a page of its own: [cyan]{program} local --help[/]")
    console.print(EXIT_CODES, style="dim")


def run_process() -> NoReturn:
    """Entry point of the process. Taking torch down takes half a second of CPU per process; nothing is left to save."""
    start_again_if_needed()
    output = open_standard_streams()
    code = main()
    logging.shutdown()
    if output.lost is not None and code == EXIT_OK:
        _print_error(f"standard output: {output.lost.strerror}; some of it is missing")
        code = EXIT_FAILED
    os._exit(code)


if __name__ == "__main__":
    run_process()

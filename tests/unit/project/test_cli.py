"""The command line: its help fits a screen, its flags do not change by accident, its mistakes are one sentence."""

from __future__ import annotations

import asyncio
import importlib
import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import pytest
import tyro
from rich.console import Console

import run_node
from common.command_line import (
    HelpPage,
    arguments_for,
    field_docs,
    help_rows,
    parse,
    print_help,
    print_settings,
    read_config_file,
    resolved_text,
)
from common.errors import ConfigError, DataError, UnavailableError
from common.settings import is_file_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[3]
FROZEN_FLAGS = Path(__file__).with_name("cli_flags.txt")
MAX_HELP_LINES = 40
MAX_FLAGS = 200


@dataclass(frozen=True, kw_only=True)
class Base:
    where: Path | None = None
    """Where it is. Not shown."""
    until_noon: bool = False
    """Leave at noon."""


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    steps: int = 3
    """How many."""
    rate: float = 0.5
    """How fast."""
    codec: Literal["fp32", "int8"] = "fp32"
    """How small."""
    peers: tuple[str, ...] = ()
    """With whom."""
    plain: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Without colours."""


PAGE = HelpPage(name="demo", summary="a demonstration.", config=Config, examples=("demo --steps 4",))


@pytest.fixture(autouse=True)
def _interrupts_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def exit_code(*arguments: str) -> int | str | None:
    try:
        return run_node.main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("command", run_node.COMMANDS, ids=lambda command: command.name)
@pytest.mark.parametrize("width", [80, 100])
def test_each_help_page_fits_a_screen_with_one_to_three_examples(command: run_node.Command, width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        print_help(command, console, "kilohive")
    lines = capture.get().splitlines()
    assert len(lines) <= MAX_HELP_LINES
    assert max(len(line.rstrip()) for line in lines) <= width
    assert 1 <= sum(line.startswith("  kilohive ") for line in lines) <= 3


@pytest.mark.parametrize("command", [command.name for command in run_node.COMMANDS])
def test_help_exits_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    assert f" {command}: " in capsys.readouterr().out


def test_the_examples_in_the_help_pages_are_valid() -> None:
    for command in run_node.COMMANDS:
        for example in command.examples:
            words = __import__("shlex").split(example)
            assert words[0] == command.name
            parse(command, words[1:], "kilohive")


def test_the_flags_are_those_that_were_frozen() -> None:
    actual = [f"{command.name} {flag}" for command in run_node.COMMANDS for flag, _ in help_rows(command.config)]
    frozen = FROZEN_FLAGS.read_text(encoding="utf-8").splitlines()
    assert actual == frozen, "the command line changed: say so in CHANGELOG, then write the new list to cli_flags.txt"


def test_the_command_line_stays_small() -> None:
    assert len(FROZEN_FLAGS.read_text(encoding="utf-8").splitlines()) <= MAX_FLAGS


def test_every_setting_is_explained_by_a_whole_sentence() -> None:
    for command in run_node.COMMANDS:
        docs = {name: doc for owner in command.config.__mro__ for name, doc in field_docs(owner).items()}
        for field in fields(command.config):
            assert re.match(r"[A-Z][a-z]+ .*\.$", " ".join(docs[field.name].split())), f"{command.name} {field.name}"


FILE_SETTINGS = [
    (command, name)
    for command in run_node.COMMANDS
    for name, hint in get_type_hints(command.config, include_extras=True).items()
    if is_file_only(hint)
]


@pytest.mark.parametrize(("command", "name"), FILE_SETTINGS, ids=lambda value: getattr(value, "name", value))
def test_a_setting_of_the_file_is_refused_as_a_flag_and_shown_with_the_line_to_write(
    command: run_node.Command, name: str
) -> None:
    flag = f"--{name.replace('_', '-')}"
    for arguments in ([flag, "1"], [f"{flag}=1"]):
        with pytest.raises(ConfigError) as caught:
            parse(command, arguments, "kilohive")
        assert f"{flag}: {name} is a setting of the config file, not a flag: write a line such as {name} = " in str(
            caught.value
        )
    console = Console(width=100, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        print_settings(command, console, "kilohive")
    assert f"\n{name} = " in capture.get()


def test_a_program_sets_what_only_the_file_has_with_the_checks_of_the_file() -> None:
    page = next(command for command in run_node.COMMANDS if command.name == "coordinator")
    values = {"out": Path("a b"), "averaging_codec": "bf16", "warmup_tokens": 5, "manifest": None}
    arguments = arguments_for(values, page.config)
    assert arguments == ["--out", "a b", "--set", 'averaging_codec = "bf16"', "--set", "warmup_tokens = 5"]
    config = parse(page, arguments, "kilohive").config
    assert (config.out, config.averaging_codec, config.warmup_tokens) == (Path("a b"), "bf16", 5)
    for wrong, words in (
        ("warmup_tokens=many", "--set warmup_tokens: must be a whole number, is 'many'"),
        ("averaging_codec=fp8", "--set averaging_codec: is 'fp8', must be one of"),
        ("warmup=1", "--set warmup: unknown setting"),
        ("warmup_tokens", "--set warmup_tokens: must be NAME=VALUE"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            parse(page, ["--set", wrong], "kilohive")


def test_the_older_name_of_join_is_accepted_and_in_no_help_page() -> None:
    for command in run_node.COMMANDS:
        if "swarm" in {field.name for field in fields(command.config)}:
            assert parse(command, ["--swarm", "x.toml"], "kilohive").config.swarm == Path("x.toml")
        assert not any(flag.startswith("--swarm") for flag, _ in help_rows(command.config))


def test_the_limits_of_a_host_are_shown_by_both_flags(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for flag in ("--help-limits", "--help-settings"):
        assert exit_code("host", flag) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "--max-memory TEXT" in shown[0]


def test_every_flag_says_what_it_is_for() -> None:
    for command in run_node.COMMANDS:
        for flag, meaning in help_rows(command.config):
            assert len(meaning.plain.split(" [")[0]) > 3, f"{command.name} {flag}"


@pytest.mark.parametrize("command", run_node.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_role(command: run_node.Command) -> None:
    assert asyncio.iscoroutinefunction(command.load())


def test_help_does_not_import_torch_or_hivemind() -> None:
    code = (
        "import sys, run_node; run_node.main(['--help']); run_node.main(['local', '--help']);"
        "sys.exit(str({'torch', 'hivemind', 'matplotlib', 'uvloop'} & sys.modules.keys() or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""


def test_the_overview_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {command.name} " in out for command in run_node.COMMANDS)
    assert "Exit codes: 0 done, 1 failed, 2 a mistake" in out
    assert exit_code() == run_node.EXIT_USAGE


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.startswith("kilohive ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fly",), "error: no command 'fly'; it is one of local, host,"),
        (("local", "--stps", "3"), "Unrecognized options: --stps"),
        (("local", "--steps", "many"), "invalid literal for int()"),
        (("local", "--gate", "router"), "error: --gate: is 'router', must be one of topk, product_key"),
        (("local", "--log-level", "loud"), "invalid choice: 'loud'"),
        (("local", "--steps", "0"), "error: --steps: must be 1 or more, is 0"),
        (("local", "--config", "none.toml"), "error: --config none.toml: cannot be read: No such file or directory"),
        (("status",), "error: name the swarm with --join INVITE"),
        (("host",), "error: name the swarm with --join INVITE"),
        (("inspect",), "or a model that has left its swarm with --export FOLDER"),
        (("serve",), "or a model that has left its swarm with --export FOLDER"),
        (("host", "--join", "kh1oops"), "error: invite: is damaged or cut short; copy it again, whole"),
        (("train", "--swarm", "none.toml"), "error: none.toml: cannot be read: No such file"),
        (("train", "--join", "none.toml"), "error: invite: 'none.toml' is neither an invite"),
        (("train", "--k-min", "2"), "error: --k-min: k_min is a setting of the config file"),
        (("lighthouse",), "error: "),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "run_node.py"), *arguments]
    result = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def parsed(tmp_path: Path, toml: str, *arguments: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(toml, encoding="utf-8")
    return parse(PAGE, ["--config", str(path), *arguments], "kilohive").config


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    toml = "steps = 5\nrate = 2\npeers = ['a', 'b']\nplain = true\nwhere = 'x/y'\nuntil-noon = true"
    config = parsed(tmp_path, toml, "--steps", "7")
    assert config == Config(steps=7, rate=2.0, peers=("a", "b"), plain=True, where=Path("x/y"), until_noon=True)


def test_without_a_file_the_defaults_hold() -> None:
    result = parse(PAGE, ["--peers", "a", "b"], "kilohive")
    assert result.config == Config(peers=("a", "b"))
    assert result.given == {"peers"}
    assert result.log_level == "info"


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("stps = 3", "stps: unknown setting"),
        ("steps = 'x'", "steps: must be a whole number, is 'x'"),
        ("steps = 1.5", "steps: must be a whole number, is 1.5"),
        ("steps = true", "steps: must be a whole number, is True"),
        ("rate = 'x'", "rate: must be a number"),
        ("plain = 1", "plain: must be true or false"),
        ("codec = 'fp8'", "codec: is 'fp8', must be one of fp32, int8"),
        ("peers = 'a'", "peers: must be a list of texts"),
        ("peers = [1]", "peers: must be a list of texts"),
        ("where = 3", "where: must be a path"),
        ("steps =", "not TOML"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path: Path, toml: str, words: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(toml, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config_file(Config, path)
    assert f"--config {path}: " in str(caught.value)
    assert words in str(caught.value)


def test_every_command_takes_every_one_of_its_settings_from_a_file(tmp_path: Path) -> None:
    for command in run_node.COMMANDS:
        default = command.config()
        given = {name: getattr(default, name) for name in vars(default)}
        lines = [f"{name} = {toml_value(value)}" for name, value in given.items() if value is not None]
        path = tmp_path / f"{command.name}.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        assert parse(command, ["--config", str(path)], "kilohive").config == default


def toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value)) if isinstance(value, tuple) else repr(str(value) if isinstance(value, Path) else value)


def test_a_name_without_a_flag_is_shown_and_read_as_one() -> None:
    command = next(command for command in run_node.COMMANDS if command.name == "experiment")
    assert next(flag for flag, _ in help_rows(command.config)) == "NAME"
    parsed = parse(command, ["--preset", "full", "granularity"], "kilohive").config
    assert (parsed.name, parsed.preset) == ("granularity", "full")


def test_a_command_that_is_not_installed_says_so_and_a_broken_one_shows_its_trace() -> None:
    command = next(command for command in run_node.COMMANDS if command.name == "experiment")
    with pytest.raises(ConfigError, match="run it in a checkout of the source"):
        replace(command, entry="no_such_package.run:run").load()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        replace(command, entry="experiments.no_such_module:run").load()


def test_a_field_is_explained_by_the_text_under_it() -> None:
    assert field_docs(Config)["rate"] == "How fast."
    rows = {flag: meaning.plain for flag, meaning in help_rows(Config)}
    assert rows["--steps N"] == "How many [3]"
    assert rows["--codec fp32|int8"] == "How small [fp32]"
    assert rows["--where PATH"] == "Where it is"
    assert next(iter(rows)) == "--steps N"


def test_the_resolved_configuration_holds_every_setting() -> None:
    text = resolved_text(PAGE, parse(PAGE, ["--steps", "9"], "kilohive"))
    assert text.plain.strip() == ("demo where=None until_noon=False steps=9 rate=0.5 codec=fp32 peers=- plain=False")


def test_an_invite_is_not_shown_whole_since_its_end_may_be_a_secret() -> None:
    command = next(command for command in run_node.COMMANDS if command.name == "status")
    invite = "kh1" + "".join(chr(ord("A") + n % 26) for n in range(300))
    shown = resolved_text(command, parse(command, ["--join", invite], "kilohive")).plain
    assert f"join={invite[:40]}... " in shown


# A role that tests control: run in this process, as `main` would run a real one.
async def role_that_waits(_config: Any, stop: asyncio.Event) -> None:
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(stop.wait(), 10)


async def role_that_succeeds(_config: Any, _stop: asyncio.Event) -> None:
    return


async def role_with_code(_config: Any, _stop: asyncio.Event) -> int:
    return 7


async def role_that_fails(_config: Any, _stop: asyncio.Event) -> None:
    raise UnavailableError("nobody answers")


async def role_whose_tasks_fail(_config: Any, _stop: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(role_that_fails(_config, _stop))


async def role_with_a_full_disk(_config: Any, _stop: asyncio.Event) -> None:
    raise OSError(28, "No space left on device", "runs/x")


async def role_with_a_bug(_config: Any, _stop: asyncio.Event) -> None:
    raise ZeroDivisionError


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(role: Callable[..., Any], *, endless: bool = False) -> None:
        command = run_node.Command(
            name="demo",
            summary="x.",
            config=Config,
            examples=(),
            entry=f"{__name__}:{role.__name__}",
            endless=endless,
        )
        monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
        monkeypatch.setattr(run_node, "COMMANDS", (command,))

    return use


@pytest.mark.parametrize(
    ("role", "endless", "code"),
    [
        (role_that_succeeds, False, 0),
        (role_with_code, False, 7),
        (role_that_waits, False, 130),
        (role_that_waits, True, 0),
        (role_that_fails, False, 1),
        (role_whose_tasks_fail, False, 1),
        (role_with_a_full_disk, False, 1),
    ],
)
def test_a_roles_end_is_the_exit_code(
    only: Callable[..., None], role: Callable[..., Any], *, endless: bool, code: int
) -> None:
    only(role, endless=endless)
    assert exit_code("demo") == code


@pytest.mark.parametrize(
    ("role", "sentence"),
    [
        (role_that_fails, "error: nobody answers\n"),
        (role_whose_tasks_fail, "error: nobody answers\n"),
        (role_with_a_full_disk, "error: runs/x: No space left on device\n"),
    ],
)
def test_an_expected_error_is_one_sentence(
    only: Callable[..., None], role: Callable[..., Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    only(role)
    exit_code("demo", "--log-level", "error")
    assert capsys.readouterr().err == sentence


def test_a_bug_is_not_hidden(only: Callable[..., None]) -> None:
    only(role_with_a_bug)
    with pytest.raises(ZeroDivisionError):
        exit_code("demo")


def test_exit_codes_of_errors() -> None:
    assert ConfigError("x").exit_code == run_node.EXIT_USAGE
    assert DataError("x").exit_code == run_node.EXIT_FAILED


def test_entries_name_modules_that_exist() -> None:
    for command in run_node.COMMANDS:
        module = command.entry.partition(":")[0]
        assert importlib.util.find_spec(module) is not None


async def role_that_ignores_stop(_config: Any, stop: asyncio.Event) -> None:
    print("up", flush=True)
    await stop.wait()
    print("asked", flush=True)
    await asyncio.sleep(60)


def in_another_process(entry: str, path: Path = ROOT) -> subprocess.Popen[str]:
    code = (
        "import run_node, sys; from tests.unit.project.test_cli import Config;"
        f"c = run_node.Command(name='demo', summary='', config=Config, examples=(), entry={entry!r});"
        "run_node.COMMANDS = (c,); sys.exit(run_node.main(['demo']))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_interrupt_does_not_wait() -> None:
    with in_another_process("tests.unit.project.test_cli:role_that_ignores_stop") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in stderr


async def role_that_tells_its_stop(_config: Any, stop: asyncio.Event) -> None:
    print("up", flush=True)
    await stop.wait()
    await asyncio.sleep(0.3)  # as long as saving takes: a terminal that is closed may signal again meanwhile
    print("saved", flush=True)


def test_a_terminal_that_is_closed_stops_a_role_as_sigterm_does() -> None:
    with in_another_process("tests.unit.project.test_cli:role_that_tells_its_stop") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        stdout, stderr = process.communicate(timeout=20)
    assert (stdout, process.returncode) == ("saved\n", 130)
    assert "Traceback" not in stderr


def test_a_hangup_that_nohup_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = in_another_process("tests.unit.project.test_cli:role_that_tells_its_stop")
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=20)
    assert (stdout, process.returncode) == ("saved\n", 130)


def test_an_interrupt_during_the_imports_shows_no_trace(tmp_path: Path) -> None:
    (tmp_path / "slow_role.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    with in_another_process("slow_role:run", tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in stderr

"""From command line and TOML file to a frozen configuration, and from a configuration to a help page of one screen.

tyro parses and converts the flags; this adds `--config FILE`, settings that only the file has (`FileOnly`), and a help
page that gives each flag one line, taken from the docstring under its field. Flags win over the file, the file over a
preset that other settings bring (`Preset`), and that over the defaults.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
import tomllib
import types
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import tomli_w
import tyro
from rich.table import Table
from rich.text import Text

from common.errors import ConfigError
from common.settings import flag_of, is_file_only, is_hidden, preset_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from _typeshed import DataclassInstance
    from rich.console import Console

C = TypeVar("C", bound="DataclassInstance")
MAX_CONFIG_BYTES = 65_536
MAX_CHOICES_CHARS = 12
MAX_SHOWN_INVITE = 40
LOG_LEVELS = ("debug", "info", "warning", "error")
HELP_SETTINGS = "--help-settings"
HELP_LIMITS = "--help-limits"
"""What HELP_SETTINGS was called when it showed nothing but a host's limits."""
SHARED_FLAGS = (
    ("--config FILE", "Read settings from a TOML file; flags win over it"),
    ("--log-level LEVEL", f"Log at this level: {', '.join(LOG_LEVELS)} [info]"),
    (HELP_SETTINGS, "Show the settings that this page leaves out"),
)


@dataclass(frozen=True, kw_only=True)
class HelpPage(Generic[C]):
    """One subcommand as a person meets it: its name, a sentence, examples and the class of its configuration.

    `limits`: the base class of `config` whose flags the page of HELP_SETTINGS shows, if one has.
    """

    name: str
    summary: str
    config: type[C]
    examples: tuple[str, ...]
    limits: type | None = None


@dataclass(frozen=True, kw_only=True)
class Parsed(Generic[C]):
    """What the command line and the file said.

    `given`: names of the fields that differ from their defaults. `stop_on_stdin_eof`: the process belongs to a parent
    and leaves when its standard input ends.
    """

    config: C
    log_level: str
    given: frozenset[str]
    stop_on_stdin_eof: bool


def parse(page: HelpPage[C], arguments: Sequence[str], program: str) -> Parsed[C]:
    """Read flags and the optional file. Raises ConfigError for the file, SystemExit(2) for a flag, after a sentence."""
    known, rest = _shared_flags(f"{program} {page.name}").parse_known_args(list(arguments))
    _refuse_settings_of_the_file(page.config, rest)
    _check_choices(page.config, rest)
    from_file = read_config_file(page.config, known.config) if known.config is not None else {}
    settings = {**from_file, **_read_assignments(page.config, known.settings)}
    read = partial(tyro.cli, page.config, prog=f"{program} {page.name}", args=rest, add_help=False)
    config = read(default=page.config(**settings))
    # Read again, below what was given: a flag at its default cannot be told from one that was left out.
    if preset := preset_of(config):
        config = read(default=page.config(**{**preset, **settings}))
    return Parsed(
        config=config,
        log_level=known.log_level,
        given=_given(config, page.config()),
        stop_on_stdin_eof=known.stop_on_stdin_eof,
    )


def _shared_flags(prog: str) -> argparse.ArgumentParser:
    """The flags of every command. The last two are for programs that start nodes, and in no help page."""
    shared = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    shared.add_argument("--config", type=Path)
    shared.add_argument("--log-level", choices=LOG_LEVELS, default="info")
    shared.add_argument("--set", dest="settings", action="append", default=[])
    shared.add_argument("--stop-on-stdin-eof", action="store_true")
    return shared


def arguments_for(values: Mapping[str, object], cls: type | None = None) -> list[str]:
    """Arguments with which a program gives a command its settings; None leaves one out.

    `cls` is the command's configuration, needed where a setting can be one that only the file has.
    """
    hints = get_type_hints(cls, include_extras=True) if cls else {}
    words: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        words += ["--set", _toml_line(name, value)] if is_file_only(hints.get(name)) else [flag_of(name), str(value)]
    return words


def _toml_line(name: str, value: object) -> str:
    """NAME = VALUE as a TOML file has it, on one line."""
    if isinstance(value, tuple):
        items = (_toml_line(name, item).removeprefix(f"{name} = ") for item in value)
        return f"{name} = [{', '.join(items)}]"
    return tomli_w.dumps({name: str(value) if isinstance(value, Path) else value}).strip()


def _refuse_settings_of_the_file(cls: type, arguments: Sequence[str]) -> None:
    hints = get_type_hints(cls, include_extras=True)
    for argument in arguments:
        flag = argument.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and is_file_only(hints.get(name)):
            raise ConfigError(
                f"{flag}: {name} is a setting of the config file, not a flag: write a line such as "
                f"{_toml_line(name, _example(getattr(cls(), name), hints[name]))} into a TOML file and name it with "
                "--config FILE"
            )


def _example(default: object, hint: Any) -> object:  # noqa: ANN401 - see _converted
    """A value that shows how a setting is written: the default or, where that says nothing, another one."""
    hint = get_args(hint)[0] if get_args(hint) else hint
    return default or {bool: True, str: "..."}.get(hint, ["..."] if get_origin(hint) is tuple else default)


def _check_choices(cls: type, arguments: Sequence[str]) -> None:
    """Tyro refuses a wrong choice too, but cuts its list of the right ones short on a narrow terminal."""
    hints = {flag_of(name): hint for name, hint in get_type_hints(cls).items()}
    for flag, value in pairwise(arguments):
        if get_origin(hints.get(flag)) is Literal:
            _converted(flag, value, hints[flag])


def _given(config: DataclassInstance, default: DataclassInstance) -> frozenset[str]:
    names = [field.name for field in fields(config)]
    return frozenset(name for name in names if getattr(config, name) != getattr(default, name))


def read_config_file(cls: type, path: Path) -> dict[str, object]:
    """Values for the fields of `cls`, checked for name and type. Raises ConfigError naming the file and the field."""
    try:
        with path.open("rb") as file:
            table = tomllib.loads(file.read(MAX_CONFIG_BYTES + 1).decode())
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not TOML: {error}") from None
    return _checked(cls, table, f"--config {path}: ")


def _read_assignments(cls: type, assignments: Sequence[str]) -> dict[str, object]:
    """Read values from NAME=VALUE, where a value is TOML or else a text."""
    return _checked(cls, dict(map(_split_assignment, assignments)), "--set ")


def _split_assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text[:80]}: must be NAME=VALUE")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value


def _checked(cls: type, table: Mapping[str, object], source: str) -> dict[str, object]:
    hints = get_type_hints(cls)
    values = {key.replace("-", "_"): value for key, value in table.items()}
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ConfigError(
            f"{source}{unknown[0]}: unknown setting; see --help and {HELP_SETTINGS} for those of this command"
        )
    return {key: _converted(f"{source}{key}", value, hints[key]) for key, value in values.items()}


def _converted(name: str, value: object, hint: Any) -> object:  # noqa: ANN401 - a type's annotation can be anything
    """`value`, as TOML gave it, in the declared type of its field."""
    if get_origin(hint) is types.UnionType:
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{name}: is {value!r}, must be one of {', '.join(map(str, get_args(hint)))}")
    if get_origin(hint) is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise ConfigError(f"{name}: must be {_type_words(hint)}, is {value!r}")


def _type_words(hint: Any) -> str:  # noqa: ANN401 - see _converted
    if get_origin(hint) is tuple:
        return "a list of texts"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return words.get(hint, str(hint))


def print_help(page: HelpPage[C], console: Console, program: str) -> None:
    """One line per flag where it fits: flag, meaning, default. What it leaves out is left to `print_settings`."""
    console.print(Text.assemble((f"{program} {page.name}", "bold"), f": {page.summary}"))
    for example in page.examples:
        console.print(Text(f"  {program} {example}", style="cyan"), soft_wrap=True)
    console.print()
    apart = {flag for flag, _ in _limits_of(page)}
    rows = [(flag, meaning) for flag, meaning in help_rows(page.config) if flag not in apart]
    shared = [(flag, Text(words)) for flag, words in SHARED_FLAGS]
    if page.limits:
        shared[-1] = (HELP_SETTINGS, Text("Show its limits of memory, bandwidth and hours, and the file's settings"))
    _print_rows([*rows, *shared], console)


def print_settings(page: HelpPage[C], console: Console, program: str) -> None:
    """What `print_help` leaves out: flags of limits, and settings that only the file has."""
    name, limits, settings = f"{program} {page.name}", _limits_of(page), list(setting_rows(page.config))
    if limits:
        console.print(Text.assemble((name, "bold"), ": what it may take of this machine, and when.\n"))
        _print_rows([*limits, *([("", Text())] * bool(settings))], console)
    if settings:
        console.print(
            Text.assemble((name, "bold"), ": settings for the TOML file of --config, as they are if not set.\n")
        )
        _print_rows(settings, console)
    if not limits and not settings:
        console.print(Text.assemble((name, "bold"), ": its help page shows all of its settings."))


def _limits_of(page: HelpPage[C]) -> list[tuple[str, Text]]:
    return list(help_rows(page.limits)) if page.limits else []


def _print_rows(rows: Sequence[tuple[str, Text]], console: Console) -> None:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for flag, meaning in rows:
        grid.add_row(Text(flag, style="bold"), meaning)
    console.print(grid)


def help_rows(cls: type) -> Iterator[tuple[str, Text]]:
    """(flag with its value's name, meaning with its default) per field; those of `cls` itself before inherited ones."""
    hints, annotated, default = get_type_hints(cls), get_type_hints(cls, include_extras=True), cls()
    for name, doc in _documented(cls):
        if is_file_only(annotated[name]) or is_hidden(annotated[name]):
            continue
        value_name, choices = _value_name(hints[name])
        flag = name.upper() if _is_positional(annotated[name]) else f"{flag_of(name)} {value_name}".strip()
        yield flag, Text.assemble(_first_sentence(doc) + choices, (_default_text(getattr(default, name)), "dim"))


def setting_rows(cls: type) -> Iterator[tuple[str, Text]]:
    """(line of the config file with the default, meaning) per setting that only the file has."""
    hints, annotated, default = get_type_hints(cls), get_type_hints(cls, include_extras=True), cls()
    for name, doc in _documented(cls):
        if is_file_only(annotated[name]):
            _, choices = _value_name(hints[name])
            yield _toml_line(name, getattr(default, name)), Text(_first_sentence(doc) + choices)


def _documented(cls: type) -> Iterator[tuple[str, str]]:
    """Name and docstring of each field, those of `cls` itself before inherited ones."""
    docs = {name: doc for owner in reversed(cls.__mro__) for name, doc in field_docs(owner).items()}
    names = dict.fromkeys(name for owner in cls.__mro__ for name in vars(owner).get("__annotations__", {}))
    return ((name, docs.get(name, "")) for name in names)


def _is_positional(hint: Any) -> bool:  # noqa: ANN401 - see _converted
    return get_args(tyro.conf.Positional[str])[1:] == getattr(hint, "__metadata__", ())


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".")


def _default_text(value: object) -> str:
    hidden = value is None or value is False or value in ("", ())
    return "" if hidden else f" [{value}]"


def _value_name(hint: Any) -> tuple[str, str]:  # noqa: ANN401 - see _converted
    """What to write for the value after the flag, and the choices where these are too long for that."""
    if get_origin(hint) is Literal:
        choices = "|".join(get_args(hint))
        return (choices, "") if len(choices) <= MAX_CHOICES_CHARS else ("NAME", f": {', '.join(get_args(hint))}")
    if get_origin(hint) is tuple:
        return "TEXT ...", ""
    if hint is Path or Path in get_args(hint):
        return "PATH", ""
    return {bool: "", int: "N", float: "X"}.get(hint, "TEXT"), ""


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field that `cls` itself declares."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    body = ast.parse(source).body[0]
    if not isinstance(body, ast.ClassDef):
        return {}
    return {
        line.target.id: doc.value.value
        for line, doc in zip(body.body, body.body[1:], strict=False)
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }


def resolved_text(page: HelpPage[C], parsed: Parsed[C]) -> Text:
    """Every setting in force, in one paragraph; those that differ from the default stand out."""
    text = Text.assemble((f"{page.name} ", "bold"))
    for field in fields(parsed.config):
        value = getattr(parsed.config, field.name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if len(shown) > MAX_SHOWN_INVITE and shown.startswith("kh"):  # its end may be a closed run's token
            shown = f"{shown[:MAX_SHOWN_INVITE]}..."
        text.append(f"{field.name}={shown or '-'} ", style="bold" if field.name in parsed.given else "dim")
    return text

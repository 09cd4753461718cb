"""The docs say what the code does: links, commands, flags, paths, tables, examples, the tree, the picture."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import re
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

import run_node
from common.command_line import HELP_LIMITS, HELP_SETTINGS, SHARED_FLAGS, help_rows, parse, setting_rows
from coordinator.events import (
    ChildEndedEvent,
    CreditEvent,
    LocalEndEvent,
    LocalStartEvent,
    PeerLeaveEvent,
    PeerStartEvent,
    SnapshotEvent,
    SnapshotFailedEvent,
)
from coordinator.lighthouse.metrics import Figures, LighthouseCollector
from coordinator.lighthouse.observer import RunView
from dht.directory import REFRESH_S
from dht.record_versions import PERIOD_S
from node.api.metrics import ServingCollector
from node.averaging import events as averaging_events
from node.data import WIKIPEDIA_ATTRIBUTION
from node.host import events as host_events
from node.host.availability import Availability, Reason
from node.host.metrics import HostCollector
from node.limits import events as limits_events
from node.membership import events as membership_events
from node.trainer import events as trainer_events
from node.trainer.events import DoneEvent
from protocol import (
    averaging_pb2,
    contribution_pb2,
    expert_pb2,
    invite_pb2,
    limits,
    node_events,
    reach_pb2,
    receipts_pb2,
    records_pb2,
    relay_pb2,
    status,
)
from protocol.manifest import BlockId
from protocol.version import PROTOCOL_VERSION
from tests.support.docs import (
    PAGES,
    ROOT,
    anchors,
    code_in,
    commands,
    fences,
    name_of,
    prose,
    python_blocks,
    spans,
    table,
)
from tests.support.events import classes_in, key

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

    from tests.support.docs import Fence

README, DOCS = ROOT / "README.md", ROOT / "docs"
SOURCES = ("common", "protocol", "dht", "node", "coordinator", "experiments", "tests", "docs")
every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@every_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name_of(page)} links to {target}"


@every_page
def test_every_path_and_test_that_is_named_exists(page: Path) -> None:
    for span in spans(page):
        path, _, test = span.partition("::")
        of_ours = path.startswith(tuple(f"{folder}/" for folder in SOURCES))
        if not of_ours or not re.fullmatch(r"[\w./-]+(/|\.(py|md|proto|svg|toml))", path):
            continue
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
        if test:
            assert re.search(rf"^(async )?def {re.escape(test)}\(", (ROOT / path).read_text(), re.MULTILINE), span


def test_pages_hold_links_paths_and_commands_to_check() -> None:
    assert any(re.findall(r"\]\(([^)\s]+)\)", prose(page)) for page in PAGES)
    assert any(span.startswith("tests/") and "::" in span for page in PAGES for span in spans(page))
    assert len([words for page in PAGES for words in commands(page)]) > 20


@every_page
def test_every_command_that_is_told_can_be_typed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fence in fences(page):
        if fence.language == "toml":
            (tmp_path / fence.code.split()[1]).write_text(fence.code)
    told = list(commands(page))
    monkeypatch.chdir(tmp_path)
    for words in told:
        check_command(words)


def check_command(words: list[str]) -> None:
    match words:
        case ["python", "run_node.py", "--help" | "--version" | "COMMAND", *_]:
            pass
        case ["python", "run_node.py", name, *flags]:
            command = next((command for command in run_node.COMMANDS if command.name == name), None)
            assert command is not None, words
            if flags not in (["--help"], [HELP_LIMITS], [HELP_SETTINGS]):
                parse(command, flags, "docs")
        case ["python", "-m", "pytest", path, *_]:
            assert (ROOT / path.partition("::")[0]).exists(), words
        case ["python", "-m", module, *_]:
            source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
            assert source.startswith('"""' + " ".join(words)), words
        case ["make", *rest]:
            check_make(rest)
        case ["docker", *rest]:
            check_docker(rest)
        case _:
            check_install(words)


OF_THE_SYSTEM = {
    *("curl", "echo", "export", "grep", "install", "journalctl", "loginctl", "mkdir", "python3", "source", "systemctl"),
    *("tar", "useradd"),
}


def check_install(words: list[str]) -> None:
    """What is installed is Kilohive, from an index or from this checkout, and what is copied is there."""
    match words:
        case ["uvx", "kilohive", *rest] | ["uvx", "--from", ".", "kilohive", *rest]:
            check_command(["python", "run_node.py", *rest])
        case ["uv", "tool", "install", what] | [("pip" | "pipx" | "/opt/kilohive/bin/pip"), "install", what]:
            assert what in {"kilohive", "."}, words
        case ["pip", "wheel", "-r", lock, "-w", folder]:
            assert (ROOT / lock).exists(), words
            assert (ROOT / folder).is_dir(), words
        case ["cp", source, _]:
            assert source == "invite.txt" or (ROOT / source).exists(), words
        case _:
            assert words[0] in OF_THE_SYSTEM, f"unknown command: {words}"


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        variable, assigned, _ = word.partition("=")
        wanted = rf"^{variable} \?=" if assigned else rf"^{word}:.* ## "
        assert re.search(wanted, makefile, re.MULTILINE), word


def check_docker(words: list[str]) -> None:
    """The file that it reads is there; what it runs in a container is a command of ours."""
    if "-f" in words:
        assert (ROOT / words[words.index("-f") + 1]).exists(), words
    if {"run", "exec"} & set(words):
        check_command(["python", "run_node.py", *words[words.index("kilohive") + 1 :]])


OF_PROGRAMS = {"--set", "--stop-on-stdin-eof", "--swarm"}
"""Flags that no help page shows: two for programs that start nodes, and what --join was called."""


@every_page
def test_every_flag_that_is_named_exists(page: Path) -> None:
    known = {row[0].split()[0] for command in run_node.COMMANDS for row in help_rows(command.config)}
    known |= {flag.split()[0] for flag, _ in SHARED_FLAGS} | {"--help", "--version", HELP_LIMITS, *OF_PROGRAMS}
    for span in spans(page):
        if span.startswith(("python -m", "docker ", "uv ", "uvx --from ")):
            continue
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)) - known
        assert not unknown, f"{name_of(page)}: `{span}`"


def test_every_setting_that_only_the_file_has_is_listed_with_its_commands() -> None:
    listed = {code_in(row[0])[0]: set(code_in(row[1])) for row in table(DOCS / "running.md", "Configuration file")}
    expected: dict[str, set[str]] = {}
    for command in run_node.COMMANDS:
        for row in setting_rows(command.config):
            expected.setdefault(row[0], set()).add(command.name)
    assert listed == expected


GROUPED = {"evaluate", "sample", "pause", "resume", "leave"}
"""Commands whose heading names several."""


def test_the_commands_page_lists_every_command() -> None:
    listed = [code_in(row[0])[0] for row in table(DOCS / "running.md", "Commands")]
    assert sorted(listed) == sorted(command.name for command in run_node.COMMANDS)
    headings = anchors(DOCS / "running.md")
    assert all(name in headings or name in GROUPED for name in listed)


def test_the_exit_codes_are_those_of_the_program() -> None:
    codes = {
        value for name, value in vars(run_node).items() if re.fullmatch(r"EXIT_[A-Z]+", name) and name[5:] != "CODES"
    }
    assert {int(row[0]) for row in table(DOCS / "running.md", "Exit codes")} == codes


@pytest.mark.parametrize(("page", "heading"), [("protocol.md", "Limits"), ("architecture.md", "Bounds")])
def test_every_bound_is_the_one_in_the_code(page: str, heading: str) -> None:
    for name, value, *_ in table(DOCS / page, heading):
        assert float(value.split()[0].replace(",", "")) == resolved(code_in(name)[0]), name


def resolved(dotted: str) -> float:
    """The value of a module's constant, or the default of a dataclass's field."""
    module, _, attribute = dotted.rpartition(".")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, class_name = module.rpartition(".")
        owner = getattr(importlib.import_module(module), class_name)
    return float(getattr(owner, attribute))


def test_every_limit_of_the_protocol_is_listed() -> None:
    listed = {code_in(row[0])[0] for row in table(DOCS / "protocol.md", "Limits")}
    assert listed >= {f"protocol.limits.{name}" for name in vars(limits) if name.isupper()}


def test_every_error_that_crosses_the_wire_is_listed_with_its_status() -> None:
    listed = {code_in(row[0])[0]: row[1] for row in table(DOCS / "protocol.md", "Errors")}
    statuses = {cls.__name__: code.name for cls, code in status._STATUS_OF.items()}
    assert listed == statuses


MESSAGES = {
    name: message
    for module in (
        expert_pb2,
        averaging_pb2,
        contribution_pb2,
        reach_pb2,
        receipts_pb2,
        records_pb2,
        relay_pb2,
        invite_pb2,
    )
    for name, message in module.DESCRIPTOR.message_types_by_name.items()
}


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_is_described_field_by_field(name: str) -> None:
    rows = table(DOCS / "protocol.md", name)
    assert [code_in(row[0])[0] for row in rows] == [field.name for field in MESSAGES[name].fields]


@pytest.mark.parametrize(
    ("module", "service", "heading"),
    [
        (expert_pb2, "Expert", "Calls"),
        (averaging_pb2, "Averaging", "Averaging"),
        (contribution_pb2, "Evaluation", "Evaluation"),
        (contribution_pb2, "Intake", "Intake"),
        (reach_pb2, "Reach", "Reach"),
        (receipts_pb2, "Credit", "Credit"),
    ],
)
def test_every_call_of_the_service_is_described(module: ModuleType, service: str, heading: str) -> None:
    methods = module.DESCRIPTOR.services_by_name[service].methods
    wanted = [[method.name, method.input_type.name, method.output_type.name] for method in methods]
    assert [[code_in(cell)[0] for cell in row[:3]] for row in table(DOCS / "protocol.md", heading)] == wanted


@pytest.mark.parametrize(
    ("enum", "message"),
    [
        (averaging_pb2.Reason, "BlockOffer"),
        (records_pb2.PauseCause, "PeerRecord"),
        (contribution_pb2.OfferState, "OfferStatus"),
        (records_pb2.ReplicaState, "BlockRecord"),
        (records_pb2.Reachability, "PeerRecord"),
    ],
)
def test_every_value_of_an_enumeration_is_explained(enum: EnumTypeWrapper, message: str) -> None:
    cells = [row[2] for row in table(DOCS / "protocol.md", message) if row[1] == enum.DESCRIPTOR.name]
    assert [set(code_in(cell)) for cell in cells] == [set(enum.keys())]


def test_the_version_is_the_one_that_is_spoken() -> None:
    assert f"Version {PROTOCOL_VERSION} (`protocol_version` in the manifest)" in (DOCS / "protocol.md").read_text()


EMITTERS = {
    "hosts and trainers": (
        "node/averaging/averager.py",
        "node/averaging/progress.py",
        "node/membership/reachability.py",
        "node/membership/endpoint.py",
    ),
    "a trainer": (
        "node/trainer/trainer.py",
        "node/trainer/host_wait.py",
        "node/trainer/training_reports.py",
        "node/trainer/paused_hosts.py",
        "node/trainer/trunk_sharing.py",
        "node/trainer/evaluator/evaluator.py",
    ),
    "a host": (
        "node/host/host.py",
        "node/host/availability_report.py",
        "node/host/block_manager.py",
        "node/host/placement_controller.py",
        "node/host/checkpoints.py",
        "node/host/live_limits.py",
        "node/host/load_events.py",
        "node/host/pause.py",
        "node/host/hand_over.py",
        "node/host/expert_upload_service.py",
    ),
    "a coordinator": ("coordinator/coordinator.py", "coordinator/snapshots.py"),
    "a lighthouse": ("coordinator/lighthouse/lighthouse.py",),
    "local": ("coordinator/local.py",),
}


def test_every_file_that_tells_events_belongs_to_a_role() -> None:
    files = [path for package in ("node", "coordinator", "dht") for path in (ROOT / package).rglob("*.py")]
    telling = {path.relative_to(ROOT).as_posix() for path in files if re.search(r"events\.emit\(", path.read_text())}
    assert telling == {file for files in EMITTERS.values() for file in files}


MADE_ELSEWHERE = {"a trainer": ("node/trainer/step_report.py",), "a host": ("node/host/metrics.py",)}
"""Files that make events which another one of the role emits."""

EVENTS = {
    "hosts and trainers": (*classes_in(averaging_events), *classes_in(membership_events)),
    "a trainer": (*classes_in(node_events), *classes_in(trainer_events)),
    "a host": (*classes_in(host_events), *classes_in(limits_events)),
    "a coordinator": (PeerStartEvent, PeerLeaveEvent, SnapshotEvent, SnapshotFailedEvent, CreditEvent),
    "a lighthouse": (PeerStartEvent, PeerLeaveEvent),
    "local": (LocalStartEvent, ChildEndedEvent, LocalEndEvent),
}


def test_every_event_belongs_to_a_role() -> None:
    packages = ("common", "protocol", "dht", "node", "coordinator")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    defined = [name for path in files for name in re.findall(r"^class (\w+)\(Event\):", path.read_text(), re.MULTILINE)]
    assert sorted(defined) == sorted({kind.__name__ for kinds in EVENTS.values() for kind in kinds})


@pytest.mark.parametrize("role", EVENTS)
def test_every_event_is_made_by_its_role(role: str) -> None:
    texts = [(ROOT / file).read_text() for file in (*EMITTERS[role], *MADE_ELSEWHERE.get(role, ()))]
    made = {name for text in texts for name in re.findall(r"\b(\w+Event)\(", text)}
    assert made == {kind.__name__ for kind in EVENTS[role]}


@pytest.mark.parametrize("role", EVENTS)
def test_every_event_is_described_with_its_fields(role: str) -> None:
    rows = table(DOCS / "running.md", f"Events of {role}")
    listed = {code_in(row[0])[0]: set(code_in(row[1])) for row in rows}
    emitted = {kind.event: {key(field.name) for field in fields(kind)} for kind in EVENTS[role]}
    if role == "a trainer":
        emitted["done"] = {"summary.json"}  # its fields have a test of their own
    assert {event: names & emitted.get(event, set()) for event, names in listed.items()} == emitted


def test_every_field_of_the_summary_is_named() -> None:
    named = set(spans(DOCS / "running.md"))
    assert {field.name for field in fields(DoneEvent)} <= named


def test_every_metric_is_listed() -> None:
    runtime = SimpleNamespace(
        queue_tokens=0,
        kept_bytes=0,
        tokens_per_s=0.0,
        tokens_total=0,
        staleness=0.0,
        steps_refused=0,
        blocks={BlockId(0, 0): SimpleNamespace(version=1)},
    )
    service = SimpleNamespace(calls_ok=0, calls_refused=0)
    availability = Availability()
    availability.tell(Reason.OWNER, "its owner paused it")
    served = {
        sample.name: family.type
        for family in HostCollector(cast("Any", runtime), cast("Any", service), availability).collect()
        for sample in family.samples
    }
    assert {code_in(row[0])[0]: row[1] for row in table(DOCS / "running.md", "Metrics")} == served


def test_every_metric_of_a_lighthouse_is_listed() -> None:
    one = dict.fromkeys(("connections", "members", "records", "reservations", "circuits"), 1)
    now = Figures(run=RunView(), calls={"rpc_ping": 1}, relayed_bytes=1, refused=1, **one)
    families = LighthouseCollector(lambda: now).collect()
    served = {sample.name: family.type for family in families for sample in family.samples}
    assert {code_in(row[0])[0]: row[1] for row in table(DOCS / "running.md", "Metrics of a lighthouse")} == served


def test_every_metric_of_a_server_is_listed() -> None:
    batch = SimpleNamespace(n_running=0, n_waiting=0, tokens_read=0, tokens_written=0, steps=0)
    served = SimpleNamespace(experts=SimpleNamespace(count=lambda: SimpleNamespace(n_live=1)))
    answered = Counter({("/health", 200): 1})
    families = ServingCollector(cast("Any", served), cast("Any", batch), answered).collect()
    found = {sample.name: family.type for family in families for sample in family.samples}
    assert {code_in(row[0])[0]: row[1] for row in table(DOCS / "running.md", "Metrics of a server")} == found


@pytest.mark.parametrize("block", python_blocks(with_swarm=False), ids=lambda block: name_of(block.page))
def test_an_example_that_needs_no_swarm_runs(block: Fence) -> None:
    # In its own namespace; its own assertions are part of what the reader sees, so it has some.
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(block.code)))
    exec(compile(block.code, name_of(block.page), "exec"), {})  # noqa: S102 - an example of ours


@pytest.mark.parametrize("block", python_blocks(with_swarm=True), ids=lambda block: name_of(block.page))
def test_an_example_that_needs_a_swarm_compiles(block: Fence) -> None:
    # tests/integration/test_docs.py runs it.
    imported = [n.module for n in ast.walk(ast.parse(block.code)) if isinstance(n, ast.ImportFrom) and n.module]
    assert any(module.startswith(("kilohive", "node.", "protocol")) for module in imported)


def test_the_tree_in_the_readme_is_the_tree() -> None:
    block = next(fence.code for fence in fences(README) if fence.code.startswith("kilohive\n"))
    rows = re.findall(r"^(│   )?[├└]── (\S+) +(\S.*)$", block, re.MULTILINE)
    assert len(rows) == len(block.splitlines()) - 1, "each entry has a phrase"
    listed = {name for nested, name, _ in rows if not nested}
    tracked, new = top_level("--cached"), top_level("--others", "--exclude-standard")
    assert tracked - listed == set(), "not in README's tree"
    assert listed - tracked - new == set(), "only in README's tree"
    above = ""
    for nested, name, _ in rows:
        above = above if nested else name
        assert (ROOT / (above + name if nested else name)).exists(), name


def top_level(*which: str) -> set[str]:
    """First parts of the paths that git lists, with a slash after a folder's."""
    listed = subprocess.run(
        ["/usr/bin/env", "git", "ls-files", *which],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout.splitlines()
    parts = (path.partition("/") for path in listed if (ROOT / path).exists())
    return {first + ("/" if rest else "") for first, _, rest in parts}


def test_the_default_corpus_is_attributed() -> None:
    assert f"> {WIKIPEDIA_ATTRIBUTION}" in (DOCS / "data.md").read_text().splitlines()


def test_decisions_are_numbered_and_say_what_would_change_them() -> None:
    pages = sorted((DOCS / "adr").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text()
        assert text.startswith(f"# {int(page.name[:4])}. ")
        for heading in ("## Question", "## Decision", "## What would change it"):
            assert heading in text, f"{page.name} has no {heading}"


def test_every_figure_has_a_value_and_the_command_that_makes_it() -> None:
    text = README.read_text(encoding="utf-8")
    assert "…" not in text.partition("## Results")[2], "a figure is still to be filled in"
    for row in table(README, "Results"):
        assert re.search(r"\d", row[1]), f"no figure for {row[0]}"
        assert code_in(row[2]), f"no command beside {row[0]}"
    assert "`python -m tests.benchmarks.dispatch --json runs/bench/dispatch.json` makes\nthis table" in text


def test_the_picture_is_well_formed_and_tells_the_periods_of_the_code() -> None:
    picture = ET.parse(DOCS / "architecture.svg").getroot()  # noqa: S314 - a file of ours
    texts = ["".join(element.itertext()) for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert f"what is live, every {REFRESH_S:g} s" in texts
    assert f"what I host, every {PERIOD_S:g} s" in texts


@every_page
def test_the_vocabulary_is_kept(page: Path) -> None:
    without_the_box_at_home = re.sub(r"\b(?:home|home's|your) router\b", "", prose(page).lower())
    assert not re.search(r"\brouters?\b", without_the_box_at_home), "the word is gate"
    assert not any(fnmatch.fnmatch(char, "[\U0001f300-\U0001faff]") for char in page.read_text(encoding="utf-8"))

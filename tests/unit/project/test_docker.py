"""What docker/ says of the program: its commands, ports, volumes and metrics. `make compose-test` runs it for real."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter

import pytest

import run_node
from common.command_line import parse
from node.host.signals import SIGNALS
from node.limits.limits import Limits
from tests.support.compose import NEEDS_AN_ENGINE, what_is_missing
from tests.support.docs import ROOT, code_in, table

DOCKER = ROOT / "docker"
COMPOSE = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
VOLUNTEER = (DOCKER / "volunteer.yaml").read_text(encoding="utf-8")
EXAMPLE = (DOCKER / "volunteer.env.example").read_text(encoding="utf-8")
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "kilohive.json").read_text(encoding="utf-8"))
METRICS = [row for row in table(ROOT / "docs" / "running.md", "Metrics") if row[0].startswith("`kilohive_")]


def told_commands() -> list[list[str]]:
    """Of the services that run nodes, without the variables' names."""
    folded = re.findall(r"^    command: (?:>-\n((?:      .*\n)+)|([a-z].*)\n)", COMPOSE, re.MULTILINE)
    plain = (re.sub(r"\$\{\w+:-(\w*)\}", r"\1", long or short) for long, short in folded)
    return [shlex.split(text) for text in plain]


def health_commands() -> list[list[str]]:
    tests = re.findall(r"test: \[CMD, kilohive, (.*?)\]", COMPOSE)
    return [test.split(", ") for test in tests]


@pytest.mark.parametrize("words", [*told_commands(), *health_commands()], ids=" ".join)
def test_every_command_in_the_compose_file_can_be_typed(words: list[str]) -> None:
    command = next(command for command in run_node.COMMANDS if command.name == words[0])
    assert isinstance(parse(command, words[1:], "docker").config, command.config)


def volunteers_variables() -> dict[str, str]:
    """With the values that hold where its env file has none."""
    return dict(re.findall(r"\$\{(\w+):[-?]([^}]*)\}", VOLUNTEER))


def volunteers_command(settings: dict[str, str]) -> list[str]:
    """As compose makes it of an env file."""
    values = {**volunteers_variables(), **settings}
    words = re.findall(r"^      - (.*)$", VOLUNTEER, re.MULTILINE)
    return [re.sub(r"\$\{(\w+):[^}]*\}", lambda found: values[found[1]], word) for word in words]


SETTINGS = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))


@pytest.mark.parametrize("settings", [{"INVITE": "kh1x"}, {**SETTINGS, "INVITE": "kh1x"}], ids=["an invite", "all"])
def test_a_volunteers_command_can_be_typed(settings: dict[str, str]) -> None:
    name, *flags = volunteers_command(settings)
    command = next(command for command in run_node.COMMANDS if command.name == name)
    config = parse(command, flags, "docker").config
    limits = Limits.of(config)
    assert config.join == "kh1x"
    assert limits.up_bytes_per_s
    assert limits.disk_bytes
    assert (limits.schedule is not None) is ("SCHEDULE" in settings)


def test_every_setting_of_a_volunteer_is_in_the_example_with_its_default() -> None:
    defaults = volunteers_variables()
    for name in ("KILOHIVE_IMAGE", "TORCH", "PIP_NO_INDEX"):  # of whoever builds images
        del defaults[name]
    assert SETTINGS.keys() == defaults.keys()
    same = ("CPUS", "MEMORY", "BANDWIDTH_UP", "BANDWIDTH_DOWN", "DISK")
    assert {name: SETTINGS[name] for name in same} == {name: defaults[name] for name in same}


def test_a_volunteers_container_has_time_to_hand_its_blocks_over_and_its_invite_stays_out_of_git() -> None:
    signals = {number.name: word for word, number in SIGNALS.items()}
    (asked,) = re.findall(r"stop_signal: (\w+)", VOLUNTEER)
    (grace_s,) = re.findall(r"stop_grace_period: (\d+)s", VOLUNTEER)
    assert signals[asked] == "leave"
    assert int(grace_s) > 20
    assert "/docker/volunteer.env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_every_role_is_a_service_with_a_health_check() -> None:
    assert Counter(words[0] for words in told_commands()) == {"coordinator": 1, "lighthouse": 1, "host": 1, "train": 1}
    assert len(health_commands()) == 4
    assert 'CMD ["kilohive", "health"]' in DOCKERFILE


@pytest.mark.parametrize("service", ["host", "lighthouse"])
def test_prometheus_asks_the_port_that_a_service_serves(service: str) -> None:
    (words,) = (words for words in told_commands() if words[0] == service)
    port = words[words.index("--metrics-port") + 1]
    found = (DOCKER / "prometheus.yml").read_text(encoding="utf-8")
    assert re.search(rf"names: \[{service}\]\n        type: A\n        port: {port}\n", found)


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    shown = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    assert set(re.findall(r"kilohive_\w+", shown)) == {code_in(row[0])[0] for row in METRICS}


def test_the_dashboard_rates_counters_and_only_those() -> None:
    exprs = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    rated = {name for expr in exprs for name in re.findall(r"rate\((kilohive_\w+)", expr)}
    assert rated == {code_in(row[0])[0] for row in METRICS if row[1] == "counter"}


def test_the_dashboards_panels_do_not_overlap_and_use_the_provisioned_source() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    source = (DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    uids = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]}
    assert all(f"uid: {uid}\n" in source for uid in uids)


def test_the_image_gets_every_package_and_nothing_private() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert all((ROOT / path).exists() for path in kept)
    assert kept >= {
        "protocol",
        "dht",
        "node",
        "coordinator",
        "run_node.py",
        "pyproject.toml",
        "requirements.lock",
        "requirements-lighthouse.lock",
    }
    assert kept >= set(re.findall(r"^COPY (docker/\S+)", DOCKERFILE, re.MULTILINE))


def test_without_docker_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert what_is_missing() == f"{NEEDS_AN_ENGINE}: there is no command docker"

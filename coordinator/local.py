"""`local`: a whole swarm on one machine. Starts a coordinator, hosts and trainers as processes and ends them together.

A host that dies is an event, not the end: training goes on with the experts that are left. So is a trainer, but the
first, which has the terminal and whose end is the swarm's. All state is in one folder, from which `--resume` goes on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from rich.console import Console

from common.command_line import arguments_for
from common.config import EVENT_LOG_MINIMUMS, EventLogConfig
from common.errors import ConfigError, InvalidInputError, UnavailableError
from common.events import EventLog, read_event
from common.folders import LOCAL_LOCK, NODE_LOCK, SWARM_LOCK, FolderClaim, claimed, wait_until_free
from common.log_files import LogPlace, LogReader, end_of_log
from common.program import program_name
from common.progress import LOG_EVERY_S, progress_shown
from common.settings import check_minimums
from common.text import printable
from coordinator.blocks import block_list_text, split_blocks
from coordinator.children import PROGRAM, Child, ChildSpec, ProgressWatch, end_all, exit_words
from coordinator.config import (
    CoordinatorConfig,
    LocalConfig,
    RunConfig,
    check_same_run,
    manifest_of,
    read_manifest,
)
from coordinator.events import ChildEndedEvent, LocalEndEvent, LocalStartEvent
from coordinator.snapshot_config import SNAPSHOT_MINIMUMS, SnapshotConfig, check_snapshots
from coordinator.tokens import check_training, trained_tokenizer
from dht.socket_folder import remove_stale_folders
from protocol.announcements import MAX_EVALUATORS
from protocol.identity import Identity
from protocol.node_events import TrainingStartEvent

if TYPE_CHECKING:
    from pathlib import Path

    from protocol.manifest import BlockId, Manifest

logger = logging.getLogger(__name__)

STALLED_S = 120.0
"""How long a coordinator that is to open the run may neither say nor compute anything, such as while a disk is slow."""

WATCH_PERIOD_S = 0.1
FINISH_PATIENCE_S = 15.0
"""How long hosts may take to save after the last step."""

TRAINERS_PATIENCE_S = 60.0
"""How long the other trainers may take to hear that the run has its last token, to evaluate and to save."""

STOP_PATIENCE_S = 2.3
"""How long all may take after Ctrl+C: everything ends within three seconds."""

LEAVE_PATIENCE_S = 5.0
"""How long nodes of a `local` that was killed may take to leave, before this one is refused their folders."""

EXIT_INTERRUPTED = 130
TRAINER = "trainer"
LOG_RECORD = re.compile(r"\S+ \S+ [A-Z]+ \S+: (.*)")
MAX_WORDS_CHARS = 200


async def run_local(config: LocalConfig, stop: asyncio.Event) -> int:
    """Train to the last step or `stop`; returns the first trainer's exit code, or 130 if stopped.

    Raises a KilohiveError.
    """
    claim = FolderClaim(folder=config.folder, role="local", flag="--out", lock=LOCAL_LOCK)
    wait_until_free(claim, patience_s=0.0)
    check(config)
    with claimed(claim):
        await asyncio.to_thread(_wait_for_nodes_to_leave, config)
        if config.train_tokenizer and not config.resume:
            tokenizer = await trained_tokenizer(config, config.data, config.folder, stop)
            if tokenizer is None:
                return EXIT_INTERRUPTED
            config = replace(config, tokenizer=tokenizer, train_tokenizer=0)
        return await LocalSwarm(config, stop, PROGRAM).run()


def check(config: LocalConfig) -> None:
    """Find every mistake that can be found before a process is started; raises ConfigError."""
    whole = ("hosts", "replicas", "trainers", "steps", "batch", "micro_batches", "threads", "eval_bytes")
    check_minimums(config, dict.fromkeys(whole, 1) | SNAPSHOT_MINIMUMS | EVENT_LOG_MINIMUMS)
    check_training(config)
    if config.eval_every < 0:
        raise ConfigError(f"--eval-every: must be 0 (only at the start and the end) or more, is {config.eval_every}")
    stored = config.folder / "manifest.toml"
    if config.resume:
        if not stored.exists():
            raise ConfigError(f"{config.folder} holds no run to go on with: leave out --resume, or name its --out")
        manifest = read_manifest(stored)
        check_same_run(config, manifest, str(config.folder))
        _check_nodes_of_resumed(config)
    else:
        if stored.exists():
            raise ConfigError(f"{config.folder} holds a run already: add --resume to go on, or choose another --out")
        manifest = manifest_of(config, owner="", total_tokens=total_tokens(config))
    check_snapshots(config, manifest)
    _shares(config, manifest)


def total_tokens(config: LocalConfig) -> int:
    """Tokens that the run will have trained on, over which its learning rate decays."""
    return config.steps * config.batch * config.micro_batches * config.context


def _shares(config: LocalConfig, manifest: Manifest) -> list[list[BlockId]]:
    """Blocks of each host. The manifest tells how many replicas: a resumed run keeps them, whatever the flags say."""
    return split_blocks(manifest.model, config.hosts, manifest.averaging.target_replicas)


def _check_nodes_of_resumed(config: LocalConfig) -> None:
    """Each host's folder holds its blocks' weights, each trainer's its trunk and its place in its share of the text.

    Another number of nodes would look for them in the wrong place.
    """
    folder = config.folder
    began = (folder / "events.jsonl").exists()
    before = {
        "hosts": sum(path.is_dir() for path in folder.glob("host-*")),
        "trainers": 1 + sum(path.is_dir() for path in folder.glob("trainer-*")) if began else 0,
    }
    for nodes, count in before.items():
        wanted = getattr(config, nodes)
        if count not in {0, wanted}:
            raise ConfigError(f"--{nodes} {wanted}: the run in {folder} has {count} {nodes}; go on with as many")


def _wait_for_nodes_to_leave(config: LocalConfig) -> None:
    """Raise ConfigError if nodes of another's have the folders. Those of a `local` that was killed leave by themselves.

    Nothing has been written by then: a node that finds its folder in use would be refused after the swarm's file is.
    """
    folder = config.folder
    nodes = [(folder, SWARM_LOCK), (folder, NODE_LOCK)]
    nodes += [(folder / f"host-{index}", NODE_LOCK) for index in range(config.hosts)]
    nodes += [(folder / f"{TRAINER}-{index}", NODE_LOCK) for index in range(1, config.trainers)]
    for node, lock in nodes:
        wait_until_free(FolderClaim(folder=node, role="local", flag="--out", lock=lock), LEAVE_PATIENCE_S)


class LocalSwarm:
    """The processes of one local swarm. `program`: the command line up to the subcommand."""

    def __init__(self, config: LocalConfig, stop: asyncio.Event, program: tuple[str, ...]) -> None:
        self._config, self._stop, self._program = config, stop, program
        self._out = config.folder
        self._children: list[Child] = []
        self._dead: dict[str, int] = {}
        self._trainer_log_end = LogPlace(inode=0, offset=0)  # as another run of the trainer left it
        self._began = False

    async def run(self) -> int:
        """Start all, watch until the trainers have ended or `stop`, end all. Raises UnavailableError, OSError."""
        log, config = self._out / "local.jsonl", self._config
        self._events = EventLog(log, max_bytes=config.event_log_bytes, n_files=config.event_log_files)
        try:
            code = await self._start_and_watch()
        finally:
            killed = await end_all(
                self._children, self._stop, patience_s=FINISH_PATIENCE_S, stop_patience_s=STOP_PATIENCE_S
            )
            Console().show_cursor()  # a trainer that had to be killed could not
            self._events.emit(LocalEndEvent(dead=self._dead, killed=tuple(killed)))
            self._events.close()
            remove_stale_folders()  # of nodes that had to be killed
        self._tell_end(code)
        return code

    async def _start_and_watch(self) -> int:
        coordinator = await self._start_coordinator()
        if self._stop.is_set():
            return EXIT_INTERRUPTED
        manifest = read_manifest(self._out / "manifest.toml")
        logger.info("Run %s is up in %s with %d hosts", manifest.run_id, self._out, self._config.hosts)
        logger.info("See it from outside: %s status --join %s", program_name(), self._out / "swarm.toml")
        self._tell_length(manifest)
        shares = _shares(self._config, manifest)
        hosts = [self._spawn(self._host_spec(i, blocks)) for i, blocks in enumerate(shares)]
        self._trainer_log_end = end_of_log(self._out / "events.jsonl")
        trainers = [self._spawn(self._trainer_spec(i)) for i in range(self._config.trainers)]
        self._events.emit(LocalStartEvent(run_id=manifest.run_id, hosts=len(hosts)))
        return await self._watch(coordinator, hosts, trainers)

    def _tell_length(self, manifest: Manifest) -> None:
        n_tokens = manifest.optimizer.total_tokens
        if self._config.trainers > 1 and n_tokens != total_tokens(self._config):
            logger.warning(
                "Trainers go on to the run's %s tokens; --steps sets them only when a run is created", f"{n_tokens:,}"
            )

    async def _start_coordinator(self) -> Child:
        """Start it and wait until it has written how to join."""
        swarm_file = self._out / "swarm.toml"
        swarm_file.unlink(missing_ok=True)
        coordinator = self._spawn(self._coordinator_spec())
        watch = ProgressWatch(coordinator, STALLED_S)
        with progress_shown(None, LOG_EVERY_S) as tell:
            while not swarm_file.exists() and not self._stop.is_set():
                if coordinator.ended():
                    raise self._death("coordinator", coordinator, "before the run was open")
                if watch.has_stalled():
                    raise UnavailableError(
                        f"the coordinator has not opened the run, and has done nothing for {STALLED_S:.0f} s; "
                        f"the end of its log, {coordinator.spec.log}:\n{coordinator.log_tail()}"
                    )
                tell(0, f"the coordinator is opening the run: {_last_words(coordinator)}")
                await asyncio.sleep(WATCH_PERIOD_S / 2)
        return coordinator

    async def _watch(self, coordinator: Child, hosts: list[Child], trainers: list[Child]) -> int:
        first, *others = trainers
        while not self._stop.is_set():
            if first.ended():
                return await self._after_first(first, others)
            self._began = self._began or self._training_began()  # a log that is rotated forgets it in the end
            self._notice_deaths([coordinator, *hosts, *others])
            if all(host.name in self._dead for host in hosts):
                raise self._death("every host, the last one", hosts[-1], "so that no expert is left")
            await asyncio.sleep(WATCH_PERIOD_S)
        return EXIT_INTERRUPTED

    async def _after_first(self, first: Child, others: list[Child]) -> int:
        """Its exit code; where it reached the run's end, the other trainers get time to do so too."""
        code = first.reap()
        if code < 0:
            raise UnavailableError(f"the trainer {exit_words(code)}; the same command with --resume goes on")
        deadline = time.monotonic() + (TRAINERS_PATIENCE_S if code == 0 else 0.0)
        while not all(other.ended() for other in others) and not self._stop.is_set():
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(WATCH_PERIOD_S)
        self._notice_deaths(others)
        return code

    def _notice_deaths(self, children: list[Child]) -> None:
        for child in children:
            if child.name in self._dead or not child.ended() or _reached_the_end(child):
                continue
            # What ends another trainer so early ends the first as well, in better words; or concerns it alone.
            if not _is_trainer(child) and not (self._began or self._training_began()):
                raise self._death(child.name, child, "before training began")
            self._dead[child.name] = child.reap()
            self._events.emit(ChildEndedEvent(name=child.name, exit_code=self._dead[child.name]))

    def _training_began(self) -> bool:
        events = self._out / "events.jsonl"
        reader = LogReader(events, self._trainer_log_end)
        try:
            return any(read_event(line, TrainingStartEvent) for lines in iter(reader.new_lines, []) for line in lines)
        except InvalidInputError as error:
            raise UnavailableError(f"{events}: {error}; is the trainer of another version?") from None

    @staticmethod
    def _death(who: str, child: Child, when: str) -> UnavailableError:
        how = exit_words(child.reap())
        return UnavailableError(f"{who} {how} {when}; the end of its log, {child.spec.log}:\n{child.log_tail()}")

    def _tell_end(self, code: int) -> None:
        for name, exit_code in self._dead.items():
            logger.warning("%s %s during the run; see %s", name, exit_words(exit_code), self._out / name / "log.txt")
        if code == EXIT_INTERRUPTED:
            logger.warning("Stopped; the same command with --resume goes on from %s", self._out)

    def _spawn(self, spec: ChildSpec) -> Child:
        child = Child(spec)
        self._children.append(child)
        return child

    def _spec(self, name: str, *arguments: str, log: Path | None) -> ChildSpec:
        threads = str(self._config.threads)
        settings = {field.name: getattr(self._config, field.name) for field in fields(EventLogConfig)}
        return ChildSpec(
            name=name,
            argv=(*self._program, *arguments, *arguments_for(settings, EventLogConfig), "--stop-on-stdin-eof"),
            log=log,
            environment={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"},
        )

    def _coordinator_spec(self) -> ChildSpec:
        config = self._config
        flags = arguments_for({"out": self._out})
        flags += ["--evaluators", *self._evaluators()]
        snapshots = {field.name: getattr(config, field.name) for field in fields(SnapshotConfig)}
        flags += arguments_for(snapshots, CoordinatorConfig)
        if not config.resume:  # a run that exists keeps its manifest; `check` has compared the flags with it
            values = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
            flags += arguments_for({**values, "total_tokens": total_tokens(config)}, CoordinatorConfig)
        return self._spec("coordinator", "coordinator", *flags, log=self._out / "coordinator" / "log.txt")

    def _evaluators(self) -> list[str]:
        """Peer ids of its trainers, of as many as a run can name. Their keys are made here, before they are started."""
        folders = [self._trainer_folder(i) for i in range(min(self._config.trainers, MAX_EVALUATORS))]
        return [Identity.load_or_create(folder / "identity.key").peer_id for folder in folders]

    def _trainer_folder(self, index: int) -> Path:
        return self._out if index == 0 else self._out / f"{TRAINER}-{index}"

    def _host_spec(self, index: int, blocks: list[BlockId]) -> ChildSpec:
        config, state = self._config, self._out / f"host-{index}"
        flags = arguments_for(
            {
                "join": self._out / "swarm.toml",
                "state": state,
                "blocks": block_list_text(blocks),
                "device": config.device,
                "threads": config.threads,
            }
        )
        # Whoever tries a whole swarm on a laptop wants it to work there, on its battery too.
        flags += ["--set", "on_battery = true", "--page-listen", "none"]
        return self._spec(f"host-{index}", "host", *flags, log=state / "log.txt")

    def _trainer_spec(self, index: int) -> ChildSpec:
        """The first has the folder and the terminal, any other a folder in it. Together they train `--steps` steps."""
        config, first = self._config, index == 0
        out = self._trainer_folder(index)
        name = TRAINER if first else out.name
        names = ("batch", "micro_batches", "eval_every", "device", "threads", "seed", "data")
        flags = arguments_for({"join": self._out / "swarm.toml", "out": out})
        flags += arguments_for({name: getattr(config, name) for name in names})
        flags += arguments_for({"steps": config.steps if config.trainers == 1 else 0})  # 0: to the run's last token
        flags += arguments_for({"eval_bytes": config.eval_bytes}, LocalConfig)
        flags += arguments_for({"shard": index, "n_shards": config.trainers})
        flags += ["--resume"] * config.resume + ["--strict"] * config.strict + ["--plain"] * (config.plain or not first)
        # The first one's own settings were shown with ours already.
        flags += ["--log-level", "warning"] * first
        return self._spec(name, "train", *flags, log=None if first else out / "log.txt")


def _last_words(child: Child) -> str:
    """What the last line of a child's log says, without when and from where."""
    line = child.log_tail(n_lines=1)
    record = LOG_RECORD.fullmatch(line)
    return printable(record[1] if record else line)[:MAX_WORDS_CHARS]


def _is_trainer(child: Child) -> bool:
    return child.name.startswith(TRAINER)


def _reached_the_end(child: Child) -> bool:
    """Return whether an ended child is a trainer whose work was done, perhaps before the first trainer's was."""
    return _is_trainer(child) and child.reap() == 0

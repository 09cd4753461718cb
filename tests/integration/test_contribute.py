"""An expert trained at home, from `contribute --fetch` to the host that serves it: a real run, all in one loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import DataError, UnavailableError
from node.contributor.command import run_contribute
from node.contributor.config import ContributeConfig
from node.contributor.local_training import LocalTraining
from node.model.expert_file import ExpertId, expert_file, metadata_of, read_expert
from protocol.manifest import AveragingConfig
from tests.support.contributing import RunInLoop, run_in_loop
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from node.model.expert_file import Weights

PLACE = ExpertId(1, 2)
# The run itself learns nothing: whatever is gained is the contributor's.
MANIFEST = small_manifest(
    model={"experts_per_layer": 4, "experts_per_block": 4, "gate": "hash", "gate_reads": "tokens"},
    optimizer={"expert_lr": 0.0, "lr": 0.0, "total_tokens": 100_000_000},
    averaging=AveragingConfig(period_s=0.5, max_staleness=5000),
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Row {n}: the square of {n % 50} is {(n % 50) ** 2}." for n in range(3000)))
    return path


@dataclass(frozen=True)
class Files:
    """The expert in a file."""

    path: Path

    def write(self, weights: Weights) -> None:
        self.path.write_bytes(expert_file(weights, {}))

    def weights(self, run: RunInLoop) -> Weights:
        return read_expert(self.path.read_bytes(), run.manifest)

    def metadata(self) -> dict[str, str]:
        return metadata_of(self.path.read_bytes())


async def contribute(
    run: RunInLoop, path: Path, *, fetch: bool = False, train: int = 0, stop: asyncio.Event | None = None
) -> int:
    config = ContributeConfig(
        swarm=run.swarm_file,
        file=path,
        layer=PLACE.layer,
        expert=PLACE.expert,
        fetch=fetch,
        train=train,
        data=run.text,
        lr=1e-2,
        timeout_s=60,
    )
    return await run_contribute(config, stop or asyncio.Event())


async def test_an_expert_trained_at_home_is_taken_in_and_served_and_one_that_gains_nothing_is_told_why(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    file, again = Files(tmp_path / "expert.safetensors"), Files(tmp_path / "served.safetensors")
    async with run_in_loop(tmp_path, MANIFEST, text, n_hosts=1) as run:
        await run.until((run.trainer_folder / "trunk.safetensors").exists)
        assert await contribute(run, file.path, train=60) == 0
        assert file.metadata()["run_id"] == run.manifest.run_id
        told = capsys.readouterr().out  # the trainer's lines are between
        assert "expert 2 of layer 1, after 60 steps" in told
        assert "\nit gains 0." in told
        better = file.weights(run)
        assert await contribute(run, file.path) == 0
        assert "taken in by 1 of 1 hosts of block 1/0: it gains" in capsys.readouterr().out
        assert await contribute(run, again.path, fetch=True) == 0
        assert all(torch.equal(again.weights(run)[name], better[name]) for name in better)
        file.write({name: w + 1e-4 * torch.randn_like(w) for name, w in better.items()})
        assert await contribute(run, file.path) == 1
        assert "not taken in: no gain was found" in capsys.readouterr().out


async def test_training_at_home_goes_on_from_its_file_without_trainers_too_and_keeps_what_it_has_when_it_is_stopped(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    file, stop = Files(tmp_path / "expert.safetensors"), asyncio.Event()
    async with run_in_loop(tmp_path, MANIFEST, text, n_hosts=1) as run:
        await run.until((run.trainer_folder / "trunk.safetensors").exists)
        assert await contribute(run, file.path, fetch=True) == 0
        fetched = file.weights(run)
        file.write({name: 2 * w for name, w in fetched.items()})
        step, download = LocalTraining._step, LocalTraining._download_trunk

        def stopping(local_training: LocalTraining, number: int, lr: float) -> float:
            loss = step(local_training, number, lr)
            if number == 2:
                run_loop.call_soon_threadsafe(stop.set)
            return loss

        async def nobody(_: LocalTraining) -> None:
            raise UnavailableError("no trainer is up")

        def then_nobody(local_training: LocalTraining, number: int, lr: float) -> float:
            monkeypatch.setattr(LocalTraining, "_download_trunk", nobody)
            return stopping(local_training, number, lr)

        run_loop = asyncio.get_running_loop()
        monkeypatch.setattr("node.contributor.local_training.TRUNK_EVERY_S", 0.0)
        monkeypatch.setattr(LocalTraining, "_step", then_nobody)
        assert await contribute(run, file.path, train=1_000_000, stop=stop) == 0
        learnt = file.weights(run)
        for name, w in fetched.items():
            assert not torch.equal(learnt[name], 2 * w)
            assert (learnt[name] - 2 * w).abs().max() < 0.1

        def failing(local_training: LocalTraining, number: int, lr: float) -> float:
            if number == 2:
                raise DataError("the disk is gone")
            return step(local_training, number, lr)

        monkeypatch.setattr(LocalTraining, "_step", failing)
        monkeypatch.setattr(LocalTraining, "_download_trunk", download)
        with pytest.raises(DataError):
            await contribute(run, file.path, train=1_000_000)
        assert not torch.equal(file.weights(run)["w_in"], learnt["w_in"])

"""The training step with every expert in this process: it learns, repeats exactly, and resumes exactly."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import CheckpointError, DivergedError, TooFewExpertsError
from node.data import open_dataset
from node.model.checkpoint import read_checkpoint, write_checkpoint
from node.model.moe import LocalExperts
from node.trainer.train_step import MAX_STEPS_LEFT_OUT, StepConfig, Training, build_model
from node.trainer.trunk_state import FILE_NAME, TrainingProgress, load_trunk, load_trunk_weights, save_trunk
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from node.data import TextDataset
    from protocol.manifest import Manifest

MANIFEST = small_manifest(optimizer={"lr": 1e-2, "expert_lr": 1e-2, "total_tokens": 20_000, "warmup_tokens": 256})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Bee number {n} flies to flower {n % 7}." for n in range(600)))
    return open_dataset(text, cache_dir=folder / "cache", seed=0)


def give_up(error: TooFewExpertsError) -> None:
    raise error


class Bench:
    """A training over local experts, closed at the end."""

    def __init__(
        self,
        dataset: TextDataset,
        manifest: Manifest = MANIFEST,
        experts: LocalExperts | None = None,
        config: StepConfig | None = None,
    ) -> None:
        self.experts = experts or LocalExperts(manifest)
        generator = torch.Generator().manual_seed(1)
        model = build_model(manifest, self.experts, generator)
        config = config or StepConfig(batch=8, micro_batches=1)
        self.training = Training(manifest, model, self.experts, dataset, config, give_up)

    def losses(self, n: int) -> list[float]:
        return [self.training.step().loss for _ in range(n)]


@pytest.fixture
def bench(dataset: TextDataset) -> Iterator[Bench]:
    bench = Bench(dataset)
    yield bench
    bench.training.close()


@pytest.fixture
def other(dataset: TextDataset) -> Iterator[Bench]:
    bench = Bench(dataset)
    yield bench
    bench.training.close()


def test_it_learns(bench: Bench) -> None:
    before = bench.training.evaluate(2000)
    losses = bench.losses(60)
    assert losses[-1] < losses[0] / 2
    assert bench.training.evaluate(2000) < before / 2
    assert bench.training.run_tokens == 60 * 8 * 16


def test_a_trunk_that_is_averaged_with_others_steps_further(bench: Bench) -> None:
    bench.training.run_tokens = 1000
    alone = bench.training.step()
    bench.training.run_tokens, bench.training.rate_scale = 1000, 2.0
    assert bench.training.step().lr == pytest.approx(2 * alone.lr)


def test_the_same_seed_gives_the_same_losses(bench: Bench, other: Bench) -> None:
    assert bench.losses(5) == other.losses(5)


def test_micro_batches_in_flight_read_the_batches_that_one_at_a_time_would(dataset: TextDataset) -> None:
    still = {"expert_lr": 0.0, "lr": 0.0}
    manifest = small_manifest(dtype="fp64", codec="fp64", optimizer=still, model={"balance_rate": 0.0})
    experts = LocalExperts(manifest)
    losses = []
    for micro_batches in (1, 4):
        generator = torch.Generator().manual_seed(1)
        model = build_model(manifest, experts, generator)
        config = StepConfig(batch=8, micro_batches=micro_batches)
        training = Training(manifest, model, experts, dataset, config, give_up)
        per_step = [training.step().loss for _ in range(4 // micro_batches)]
        losses.append(sum(per_step) / len(per_step))
        training.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_no_more_micro_batches_run_than_are_told_and_the_next_starts_when_one_has_ended(dataset: TextDataset) -> None:
    bench = Bench(dataset, config=StepConfig(batch=1, micro_batches=6, in_flight=2))
    lock, running, most, both = threading.Lock(), 0, 0, threading.Barrier(2)

    def micro_batch(index: int) -> tuple[float, list[None]]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(10)
        with lock:
            running -= 1
        return float(index), [None]

    try:
        assert bench.training._in_flight(micro_batch, range(6)) == [(float(index), [None]) for index in range(6)]
        assert most == 2
        assert bench.training.step().in_flight == 2
    finally:
        bench.training.close()


def test_a_loss_that_is_not_finite_ends_the_training_before_anything_steps(bench: Bench) -> None:
    bench.losses(1)
    head = bench.training.parameters[-1]
    with torch.no_grad():
        head[0] = torch.nan
    versions = [block.version for blocks in bench.experts.blocks.values() for block in blocks]
    with pytest.raises(DivergedError, match="the loss is not finite, it is nan"):
        bench.training.step()
    assert not bench.training.is_sound
    assert bench.training.steps_done == 1
    assert [block.version for blocks in bench.experts.blocks.values() for block in blocks] == versions
    with pytest.raises(DivergedError):
        bench.training.evaluate(2000)


def test_one_gradient_that_is_not_finite_is_left_out_and_ten_in_a_row_end_the_training(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.losses(1)
    before = [p.detach().clone() for p in bench.training.parameters]

    def infinite(_loss: torch.Tensor, parameters: list[torch.Tensor], **_: object) -> list[torch.Tensor]:
        return [torch.full_like(p, torch.inf) for p in parameters]

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", infinite)
        bench.losses(MAX_STEPS_LEFT_OUT - 1)
    assert all(torch.equal(p, q) for p, q in zip(bench.training.parameters, before, strict=True))
    bench.losses(1)
    monkeypatch.setattr(torch.autograd, "grad", infinite)
    with pytest.raises(DivergedError, match="not finite for the 10th step in a row"):
        bench.losses(MAX_STEPS_LEFT_OUT)
    assert bench.training.is_sound


def test_a_resumed_training_goes_on_exactly(dataset: TextDataset, bench: Bench, other: Bench, tmp_path: Path) -> None:
    wanted = bench.losses(6)
    assert other.losses(3) == wanted[:3]
    save_trunk(tmp_path, other.training, TrainingProgress(step=3, run_tokens=other.training.run_tokens, calls_failed=2))
    resumed = Bench(dataset, experts=other.experts)
    try:
        progress = load_trunk(tmp_path, resumed.training)
        assert progress == TrainingProgress(step=3, run_tokens=3 * 8 * 16, calls_failed=2)
        assert resumed.losses(3) == wanted[3:]
    finally:
        resumed.training.close()


RECIPE = small_manifest(
    optimizer={"lr": 1e-2, "expert_lr": 1e-2, "gate_lr_fraction": 0.04, "total_tokens": 20_000, "warmup_tokens": 256},
    model={"smear": 2, "gate_reads": "tokens", "gate_score": "softmax", "balance": "proportional"},
)


def test_a_resumed_training_of_a_younger_manifest_goes_on_exactly(dataset: TextDataset, tmp_path: Path) -> None:
    whole, part = Bench(dataset, RECIPE), Bench(dataset, RECIPE)
    wanted = whole.losses(6)
    assert part.losses(3) == wanted[:3]
    save_trunk(tmp_path, part.training, TrainingProgress(step=3, run_tokens=part.training.run_tokens))
    resumed = Bench(dataset, RECIPE, experts=part.experts)
    assert load_trunk(tmp_path, resumed.training) is not None
    assert resumed.losses(3) == wanted[3:]
    for one in (whole, part, resumed):
        one.training.close()


@pytest.mark.parametrize("fraction", [0.0, 0.04])
def test_a_gate_learns_at_its_own_part_of_the_rate(dataset: TextDataset, fraction: float) -> None:
    manifest = replace(RECIPE, optimizer=replace(RECIPE.optimizer, gate_lr_fraction=fraction))
    bench = Bench(dataset, manifest)
    parameters = [next(bench.training.moe_layers[0].gate.parameters()), bench.training.model.get_parameter("head_VD")]
    before = [p.detach().clone() for p in parameters]
    lr = bench.training.step().lr
    moved_gate, moved_head = ((p.detach() - was).abs().max() for p, was in zip(parameters, before, strict=True))
    bench.training.close()
    # Adam's first step moves what has a gradient by its rate.
    assert float(moved_head) == pytest.approx(lr, rel=1e-3)
    assert float(moved_gate) == pytest.approx(fraction * lr, rel=1e-3, abs=1e-9)


def resumed_with(folder: Path, dataset: TextDataset, **changes: int) -> None:
    resumed = Bench(dataset, config=StepConfig(**{"batch": 8, "micro_batches": 1, **changes}))
    try:
        assert load_trunk(folder, resumed.training) is not None
    finally:
        resumed.training.close()


@pytest.mark.parametrize("name", ["batch", "micro_batches", "seed", "n_shards", "shard"])
def test_resuming_with_another_setting_of_the_data_is_one_warning_that_says_what_was_and_is(
    dataset: TextDataset, bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    save_trunk(tmp_path, bench.training, TrainingProgress(step=3))
    resumed_with(tmp_path, dataset)
    assert caplog.messages == []
    was = getattr(bench.training.config, name)
    resumed_with(tmp_path, dataset, **{name: 5})
    (line,) = caplog.messages
    assert f"other settings of the data: --{name.replace('_', '-')} was {was} and is 5; steps may" in line


def test_resuming_with_another_corpus_is_a_warning_and_with_a_copy_of_it_is_none(
    dataset: TextDataset, bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_trunk(tmp_path, bench.training, TrainingProgress(step=3))
    text = dataset.corpus.root.read_text(encoding="utf-8")
    (tmp_path / "copy.txt").write_text(text, encoding="utf-8")
    (tmp_path / "other.txt").write_text(text.replace("flies", "walks"), encoding="utf-8")
    resumed_with(tmp_path, open_dataset(tmp_path / "copy.txt", cache_dir=tmp_path / "cache"))
    assert caplog.messages == []
    resumed_with(tmp_path, open_dataset(tmp_path / "other.txt", cache_dir=tmp_path / "cache"))
    (line,) = caplog.messages
    assert "--data was text.txt (" in line
    assert " and is other.txt (" in line


def test_a_checkpoint_that_does_not_tell_what_was_read_is_resumed_without_a_word(
    dataset: TextDataset, bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_trunk(tmp_path, bench.training, TrainingProgress(step=3))
    stored = read_checkpoint(tmp_path / FILE_NAME)
    assert stored is not None
    tensors, metadata = stored
    write_checkpoint(tmp_path / FILE_NAME, tensors, {key: metadata[key] for key in ("run_id", "progress")})
    resumed_with(tmp_path, dataset, batch=4)
    assert caplog.messages == []


def test_a_trunk_of_another_run_is_refused(dataset: TextDataset, bench: Bench, tmp_path: Path) -> None:
    save_trunk(tmp_path, bench.training, TrainingProgress())
    stranger = Bench(dataset, small_manifest(seed=99))
    try:
        with pytest.raises(CheckpointError, match="belongs to run"):
            load_trunk(tmp_path, stranger.training)
    finally:
        stranger.training.close()


def test_a_corrupt_trunk_is_one_clear_sentence(bench: Bench, tmp_path: Path) -> None:
    save_trunk(tmp_path, bench.training, TrainingProgress())
    (tmp_path / FILE_NAME).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .* delete it to start afresh"):
        load_trunk(tmp_path, bench.training)
    with pytest.raises(CheckpointError, match="no trunk checkpoint in"):
        load_trunk_weights(tmp_path / "elsewhere", bench.training.model, MANIFEST.run_id)


def test_a_micro_batch_is_tried_again_when_too_few_experts_answer(dataset: TextDataset) -> None:
    bench = Bench(dataset)
    waited: list[str] = []
    bench.training.close()
    generator = torch.Generator().manual_seed(1)
    model = build_model(MANIFEST, bench.experts, generator)
    training = Training(
        MANIFEST, model, bench.experts, dataset, StepConfig(batch=2), lambda error: waited.append(str(error))
    )
    real, failures = bench.experts.live_experts, iter([True, True, True])

    def sometimes(layer: int) -> torch.Tensor:
        if next(failures, False):
            return torch.zeros(16, dtype=torch.bool)
        return real(layer)

    bench.experts.live_experts = sometimes  # type: ignore[method-assign]
    try:
        training.step()
    finally:
        training.close()
    assert len(waited) == 3
    assert all("none of its 16 experts has a live replica" in text for text in waited)

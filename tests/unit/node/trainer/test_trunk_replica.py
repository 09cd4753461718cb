"""The trunk as a replica: averaging may change it between steps, and the optimizer goes on from what it finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import DrainingError, InvalidInputError, TooFewExpertsError
from node.data import open_dataset
from node.model.moe import LocalExperts
from node.model.replica_state import ReplicaState, schema
from node.trainer.train_step import StepConfig, Training, build_model
from node.trainer.trunk_replica import TrunkReplica
from node.trainer.trunk_state import TrainingProgress, load_trunk, save_trunk
from protocol.manifest import TRUNK
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from node.averaging.replica import AveragedReplica
    from node.data import TextDataset

MANIFEST = small_manifest(optimizer={"lr": 1e-2, "total_tokens": 20_000})
HANG_S = 20.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Wasp number {n} finds jar {n % 7}." for n in range(600)))
    return open_dataset(text, cache_dir=folder / "cache", seed=0)


def give_up(error: TooFewExpertsError) -> None:
    raise error


@pytest.fixture
def new_training(dataset: TextDataset) -> Iterator[Callable[..., Training]]:
    made: list[Training] = []

    def make(seed: int, micro_batches: int = 2) -> Training:
        generator, experts = torch.Generator().manual_seed(seed), LocalExperts(MANIFEST)
        model = build_model(MANIFEST, experts, generator)
        config = StepConfig(batch=4, micro_batches=micro_batches)
        made.append(Training(MANIFEST, model, experts, dataset, config, give_up))
        return made[-1]

    yield make
    for training in made:
        training.close()


@pytest.fixture
def training(new_training: Callable[..., Training]) -> Training:
    return new_training(1)


def copy_of(replica: TrunkReplica) -> ReplicaState:
    return replica.call(ReplicaState.copy).result(HANG_S)


def test_it_is_one_row_of_every_parameter_bias_and_moment(training: Training) -> None:
    replica: AveragedReplica = TrunkReplica(training)
    training.step()
    state = replica.call(ReplicaState.copy).result(HANG_S)
    assert replica.id == TRUNK
    trained = {name for name, _ in training.model.named_parameters()}
    biases = {name for name in state.params if name.endswith("bias_E")}
    assert set(state.first) == set(state.second) == trained
    assert len(biases) == MANIFEST.model.n_layers
    assert set(state.params) == trained | biases
    assert all(len(t) == 1 for t in state.named().values())
    assert (state.version, replica.version, state.steps_R.tolist()) == (1, 1, [1])
    assert state.learnt_R.tolist() == [training.tokens_per_step]


def test_biases_are_averaged_and_loads_and_codes_are_not(dataset: TextDataset) -> None:
    manifest = small_manifest(model={"gate_reads": "tokens", "balance": "proportional"})
    experts = LocalExperts(manifest)
    model = build_model(manifest, experts, torch.Generator().manual_seed(0))
    training = Training(manifest, model, experts, dataset, StepConfig(batch=4), give_up)
    named = copy_of(TrunkReplica(training)).params
    training.close()
    assert {name.rpartition(".")[2] for name in named.keys() - set(dict(model.named_parameters()))} == {"bias_E"}


def test_its_tensors_have_the_same_names_and_shapes_before_the_first_step_and_after(training: Training) -> None:
    replica = TrunkReplica(training)
    before = replica.schema()
    training.step()
    assert replica.schema() == before == schema(copy_of(replica))


def test_moments_made_before_the_first_step_change_no_training(new_training: Callable[..., Training]) -> None:
    # One micro-batch at a time: of several, either may step the experts first.
    plain, shared = new_training(3, 1), new_training(3, 1)
    TrunkReplica(shared)
    assert [plain.step().loss for _ in range(4)] == [shared.step().loss for _ in range(4)]


def test_a_change_in_place_reaches_parameters_moments_and_counters(training: Training) -> None:
    replica = TrunkReplica(training)
    training.step()

    def move(state: ReplicaState) -> None:
        for _, tensors in state.groups():
            for tensor in tensors.values():
                tensor.mul_(0.5).add_(1.0)
        state.steps_R.fill_(17)
        state.version = 23

    before = copy_of(replica)
    replica.call(move).result(HANG_S)
    after = copy_of(replica)
    for name, tensor in before.named().items():
        torch.testing.assert_close(after.named()[name], tensor * 0.5 + 1.0)
    assert (after.version, after.steps_R.tolist()) == (23, [17])
    adam = training.optimizer.state
    assert {float(adam[p]["step"]) for p in training.parameters} == {17.0}
    assert all(p.requires_grad and p.is_leaf for p in training.parameters)
    assert training.steps_done == 1
    training.step()
    assert (training.version, training.steps_done) == (24, 2)


def test_a_look_during_a_step_finds_the_trunk_as_it_was_before_it(training: Training) -> None:
    replica, real = TrunkReplica(training), training.model.forward
    training.step()
    before, seen = copy_of(replica), []

    def forward_that_is_looked_at(ids_BT: torch.Tensor) -> torch.Tensor:
        seen.append(replica.look(ReplicaState.copy).result(HANG_S))
        logits_BTV: torch.Tensor = real(ids_BT)
        return logits_BTV

    training.model.forward = forward_that_is_looked_at  # type: ignore[method-assign]
    training.step()
    assert seen[0].version == 1
    assert seen[0].learnt_R.tolist() == before.learnt_R.tolist()
    assert all(torch.equal(tensor, before.named()[name]) for name, tensor in seen[0].named().items())


def test_calls_from_another_thread_run_between_gradients_and_the_optimizers_step(training: Training) -> None:
    """Were one to run any sooner, autograd would refuse the backward: a weight that it saved has changed."""
    replica = TrunkReplica(training)
    asked: list[int] = []

    def shrink(state: ReplicaState) -> None:
        for tensor in state.params.values():
            tensor.mul_(0.999)
        asked.append(training.steps_done)

    real = training.model.forward

    def forward_that_is_interrupted(ids_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV: torch.Tensor = real(ids_BT)
        futures.append(replica.call(shrink))
        return logits_BTV

    futures = [replica.call(shrink)]
    training.model.forward = forward_that_is_interrupted  # type: ignore[method-assign]
    futures[0].result(HANG_S)
    for _ in range(3):
        training.step()
    for future in futures:
        future.result(HANG_S)
    assert asked == [0, 0, 0, 1, 1, 2, 2]


def test_a_joiner_becomes_the_state_it_was_given(new_training: Callable[..., Training]) -> None:
    old, young = new_training(1), new_training(2)
    for _ in range(3):
        old.step()
    given = copy_of(TrunkReplica(old))
    replica = TrunkReplica(young)
    replica.load_state(given).result(HANG_S)
    loaded = copy_of(replica)
    for name, tensor in given.named().items():
        assert torch.equal(loaded.named()[name], tensor), name
    assert (loaded.version, loaded.steps_R.tolist()) == (3, [3])
    assert loaded.learnt_R.tolist() == [0.0]  # it has learnt nothing itself
    assert young.steps_done == 0  # and has all of its own data before it
    young.step()
    assert young.version == 4


def test_work_of_before_a_download_is_not_claimed_again(new_training: Callable[..., Training]) -> None:
    old, resumed = new_training(1), new_training(2)
    replica = TrunkReplica(resumed)
    resumed.step()
    replica.load_state(copy_of(TrunkReplica(old))).result(HANG_S)
    assert copy_of(replica).learnt_R.tolist() == [0.0]
    resumed.step()
    assert copy_of(replica).learnt_R.tolist() == [resumed.tokens_per_step]
    assert resumed.own_tokens == 2 * resumed.tokens_per_step


@pytest.mark.parametrize("problem", ["name", "shape", "dtype", "steps"])
def test_a_state_that_does_not_fit_is_refused_whole(new_training: Callable[..., Training], problem: str) -> None:
    replica = TrunkReplica(new_training(1))
    before, given = copy_of(replica), copy_of(TrunkReplica(new_training(2)))
    match problem:
        case "name":
            given.params["extra"] = torch.zeros(1, 1)
        case "shape":
            given.params["final_norm.weight"] = torch.zeros(1, 3)
        case "dtype":
            given.params["final_norm.weight"] = given.params["final_norm.weight"].double()
        case "steps":
            given.steps_R = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match="trunk: has tensors of other names, shapes or types"):
        replica.load_state(given).result(HANG_S)
    after = copy_of(replica)
    assert all(torch.equal(after.named()[name], tensor) for name, tensor in before.named().items())


def test_version_and_moments_survive_a_checkpoint(new_training: Callable[..., Training], tmp_path: Path) -> None:
    first, second = new_training(1), new_training(2)
    replica = TrunkReplica(first)
    first.step()

    def leap(state: ReplicaState) -> None:
        state.version, state.steps_R = 100, torch.tensor([90])

    replica.call(leap).result(HANG_S)
    wanted = copy_of(replica)
    progress = TrainingProgress(
        step=1, version=100, run_tokens=500, own_tokens=first.own_tokens, trainers={"other": 372}
    )
    save_trunk(tmp_path, first, progress)
    assert load_trunk(tmp_path, second) == progress
    restored = copy_of(TrunkReplica(second))
    for name, tensor in wanted.named().items():
        assert torch.equal(restored.named()[name], tensor), name
    assert (restored.version, restored.steps_R.tolist()) == (100, [90])
    assert restored.learnt_R.tolist() == [first.own_tokens]
    assert (second.steps_done, second.run_tokens) == (1, 500)


def test_a_leaving_trainer_refuses(training: Training) -> None:
    replica = TrunkReplica(training)
    training.close()
    with pytest.raises(DrainingError):
        replica.call(ReplicaState.copy)

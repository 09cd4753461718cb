"""Models that start together and train apart: their texts, their experts, and the weights that they hand out."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from common.errors import ConfigError
from experiments.apart.branches import Branches, BranchSchedule
from experiments.apart.shards import clusters, evenly, shards_of, split, texts_of, tf_idf
from experiments.arms.arm import Arm
from experiments.arms.training import nats_per_window
from tests.support.trials import Context, bee_dataset

if TYPE_CHECKING:
    from node.data import TextDataset

ARM = Arm(label="2 of 8 experts", hidden=16, experts=8, per_token=2)
COURSE = BranchSchedule(
    arm=ARM, seed=0, tokens=4_480, lr=5e-3, expert_lr=5e-3, d_model=16, layers=2, heads=2, context=16, batch=4,
    participants=4, branch_tokens=2_560, apart_tokens=1_280, evaluations=1, eval_bytes=256, final_eval_bytes=512,
)  # fmt: skip
DENSE = replace(COURSE, arm=Arm(label="dense", hidden=16))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return bee_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(tmp_path_factory.mktemp("trials") / "trial")


def test_the_shards_of_a_text_are_all_of_it_and_share_nothing(dataset: TextDataset) -> None:
    texts = texts_of(dataset, "random", 4, seed=0)
    parts = [part for text in texts for part in split(text.train)]
    assert sorted(parts) == sorted(split(dataset.train))
    assert all(text.held_out is dataset.held_out for text in texts)


def test_a_text_is_split_without_losing_a_byte(dataset: TextDataset) -> None:
    assert b"".join(split(dataset.train)) == dataset.train.tobytes()


def test_random_shards_differ_by_seed(dataset: TextDataset) -> None:
    documents = split(dataset.train)
    one, other = (shards_of(dataset, documents, "random", 4, seed) for seed in (0, 1))
    assert (one != other).any()


def test_topics_go_to_the_shard_that_has_least() -> None:
    assert evenly([5.0, 9.0, 4.0, 2.0], 2).tolist() == [1, 0, 1, 0]


def test_clusters_put_documents_of_one_subject_together() -> None:
    rng = np.random.default_rng(0)
    subjects = (b"bee flower nectar hive", b"star planet orbit moon")
    documents = [b" ".join(rng.permutation(subjects[n % 2].split())[:3].tolist()) for n in range(40)]
    cluster_N = clusters(tf_idf(documents), 2, np.random.default_rng(1))
    assert len(set(cluster_N[::2])) == len(set(cluster_N[1::2])) == 1
    assert cluster_N[0] != cluster_N[1]


def test_a_participant_moves_its_own_experts_and_no_others(dataset: TextDataset, context: Context) -> None:
    branches = Branches(COURSE, context, dataset)
    start, ours = branches.load(branches.branch()), branches.load(branches.participant("random", 2), 2)
    for layer, (own,) in ours.experts.blocks.items():
        assert list(own.experts) == [4, 5]
        assert not own.params["w_in"].equal(start.experts.blocks[layer][2].params["w_in"])
        live_E = ours.layers[layer]._experts.live_experts(layer)
        assert live_E.nonzero().flatten().tolist() == [4, 5]
    others = [0, 1, 2, 3, 6, 7]
    key = "layers.0.moe.gate.bias_E"
    assert ours.trunk.state_dict()[key][others].equal(start.trunk.state_dict()[key][others])


@pytest.mark.parametrize("course", [COURSE, DENSE], ids=["experts", "dense"])
def test_participants_learn_apart_from_one_start_and_are_not_trained_twice(
    course: BranchSchedule, dataset: TextDataset, context: Context
) -> None:
    branches = Branches(course, context, dataset)
    folders = branches.participants("random")
    told = context.told
    assert Branches(course, context, dataset).participants("random") == folders
    assert context.told == told
    models = [branches.load(folder, index) for index, folder in enumerate(folders)]
    for one, other in itertools.pairwise(models):
        assert not one.trunk.head_VD.equal(other.trunk.head_VD)


def test_a_participant_that_goes_on_alone_begins_where_it_was(dataset: TextDataset, context: Context) -> None:
    branches = Branches(DENSE, context, dataset)
    first = branches.load(branches.participant("random", 1), 1)
    end = branches.load(branches.to_the_end("random", 1), 1)
    moved = (first.trunk.head_VD - end.trunk.head_VD).norm() / first.trunk.head_VD.norm()
    assert 0 < moved < 0.5
    start = branches.load(branches.branch())
    before, after = (float(nats_per_window(m.trunk, dataset, DENSE, 512).mean()) for m in (start, end))
    assert after < before


def test_shares_that_are_not_even_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch: is 4, must be shared evenly by 3"):
        replace(COURSE, participants=3)
    with pytest.raises(ConfigError, match="apart_tokens: must be a multiple of the 64 tokens"):
        replace(COURSE, apart_tokens=100)

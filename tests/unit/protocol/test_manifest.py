from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ManifestError
from node.model.learning_rate import averaged_rate_scale, averaged_replicas, learning_rate_factor
from protocol.manifest import (
    TRUNK,
    AveragingConfig,
    BlockId,
    Manifest,
    ModelConfig,
    OptimizerConfig,
    all_blocks,
    parse_block_id,
)
from protocol.run_assets import DataConfig
from protocol.version import VERSION, is_older

OLD_RUN_ID = "a-35d6546a7d67df7a717d5d92bbb8cbe5"
"""Of the commit before the first of the younger fields."""


def test_a_manifest_survives_its_own_toml() -> None:
    manifest = Manifest(
        name="wiki-1", seed=7, codec="int8", model=ModelConfig(gate="product_key", experts_per_layer=256)
    )
    assert Manifest.from_toml(manifest.to_toml()) == manifest


def test_the_run_id_changes_with_any_field() -> None:
    manifest = Manifest(name="a")
    others = [replace(manifest, seed=1), replace(manifest, codec="bf16")]
    others += [replace(manifest, averaging=AveragingConfig(clip_radius=0.25))]
    ids = {manifest.run_id, *(other.run_id for other in others)}
    assert len(ids) == 4
    assert all(run_id.startswith("a-") for run_id in ids)


def test_a_run_that_is_older_than_a_field_keeps_its_id() -> None:
    assert Manifest(name="a", model=ModelConfig(gate="product_key", experts_per_layer=256)).run_id == OLD_RUN_ID
    younger = (
        Manifest(name="a", model=ModelConfig(smear=2)),
        Manifest(name="a", model=ModelConfig(gate_reads="tokens")),
        Manifest(name="a", model=ModelConfig(gate_heads=2)),
        Manifest(name="a", model=ModelConfig(gate_score="softmax")),
        Manifest(name="a", model=ModelConfig(balance="proportional")),
        Manifest(name="a", optimizer=OptimizerConfig(gate_lr_fraction=0.04)),
        Manifest(name="a", model=ModelConfig(vocab_size=300), data=DataConfig(tokenizer="0" * 64, tokenizer_bytes=9)),
    )
    assert len({Manifest(name="a").run_id, *(manifest.run_id for manifest in younger)}) == 1 + len(younger)
    for manifest in younger:
        assert Manifest.from_toml(manifest.to_toml()) == manifest


@pytest.mark.parametrize(
    ("toml", "field"),
    [
        ("", "name"),
        ("name = 3", "name"),
        ('name = "a b"', "name"),
        ('name = ""', "name"),
        ('name = "a"\nseed = -1', "seed"),
        ('name = "a"\ncodec = "pickle"', "codec"),
        ('name = "a"\ntypo = 1', "typo"),
        ('name = "a"\nprotocol_version = 99', "protocol_version"),
        ('name = "a"\nnew_field = 1\nprotocol_version = 99', "protocol_version"),
        ('name = "a"\nnew_field = 1\nminimum_version = "999.0"', "minimum_version"),
        ('name = "a"\nminimum_version = "soon"', "minimum_version"),
        ('name = "a"\nminimum_version = 1', "minimum_version"),
        ('name = "a"\nmodel = 3', "model"),
        ('name = "a"\n[model]\nd_model = 1e3', "model.d_model"),
        ('name = "a"\n[model]\nsmear = -1', "model.smear"),
        ('name = "a"\n[model]\nsmear = 17', "model.smear"),
        ('name = "a"\n[model]\ngate_reads = "minds"', "model.gate_reads"),
        ('name = "a"\n[model]\ngate_score = "relu"', "model.gate_score"),
        ('name = "a"\n[model]\nbalance = "loss"', "model.balance"),
        ('name = "a"\n[optimizer]\ngate_lr_fraction = -0.1', "optimizer.gate_lr_fraction"),
        ('name = "a"\n[model]\nvocab_size = 300', "model.vocab_size"),
        ('name = "a"\n[model]\nvocab_size = 262145', "model.vocab_size"),
        ('name = "a"\ndata = 1', "data"),
        ('name = "a"\n[data]\ntokenizer = "gpt2"', "data.tokenizer"),
        (f'name = "a"\n[data]\ntokenizer = "{64 * "A"}"\ntokenizer_bytes = 9', "data.tokenizer"),
        (f'name = "a"\n[data]\ntokenizer = "{64 * "0"}"', "data.tokenizer_bytes"),
        (f'name = "a"\n[data]\ntokenizer = "{64 * "0"}"\ntokenizer_bytes = 67108865', "data.tokenizer_bytes"),
        ('name = "a"\n[data]\ntokenizer_bytes = 9', "data.tokenizer_bytes"),
        ('name = "a"\n[model]\nd_model = 0', "model.d_model"),
        ('name = "a"\n[model]\nd_model = 130', "model.d_model"),
        ('name = "a"\n[model]\nd_model = true', "model.d_model"),
        ('name = "a"\n[model]\nexperts_per_layer = 100000000', "model.experts_per_layer"),
        ('name = "a"\n[model]\nexperts_per_token = 60\nexperts_per_layer = 8', "model.experts_per_token"),
        ('name = "a"\n[model]\ngate = "product_key"\nexperts_per_layer = 500', "model.experts_per_layer"),
        ('name = "a"\n[optimizer]\nlr = nan', "optimizer.lr"),
        ('name = "a"\n[optimizer]\nbeta1 = 1.0', "optimizer.beta1"),
        ('name = "a"\naveraging = 3', "averaging: must be a table"),
        ('name = "a"\n[averaging]\ntypo = 1', "averaging.typo: unknown field"),
        ('name = "a"\n[averaging]\ntarget_replicas = 0', "averaging.target_replicas: must be from 1 to 64"),
        ('name = "a"\n[averaging]\ntarget_replicas = 65', "averaging.target_replicas"),
        ('name = "a"\n[averaging]\nperiod_s = 0.01', "averaging.period_s"),
        ('name = "a"\n[averaging]\nperiod_s = inf', "averaging.period_s"),
        ('name = "a"\n[averaging]\ncodec = "fp64"', "averaging.codec: is 'fp64', must be one of fp32, bf16, int8"),
        ('name = "a"\n[averaging]\nclip_radius = 0.0', "averaging.clip_radius"),
        ('name = "a"\n[averaging]\nclip_radius = nan', "averaging.clip_radius"),
        ('name = "a"\n[averaging]\nclip_radius = 11', "averaging.clip_radius"),
        ('name = "a"\n[averaging]\nmax_rate_scale = 0.5', "averaging.max_rate_scale: must be from 1 to 64"),
        ('name = "a"\n[averaging]\nmax_staleness = -1', "averaging.max_staleness"),
        ('name = "a"\n[averaging]\nstale_action = "drop"', "averaging.stale_action: is 'drop', must be one of scale"),
        ('name = "a"\n[model]\nd_model = 1' + "0" * 400, "model.d_model"),
        ('name = "a"\n[optimizer]\nlr = 1' + "0" * 400, "optimizer.lr"),
        ("x = " + "9" * 5000, "manifest"),
        ("x = " + "[" * 4000, "manifest"),
        ("not toml", "manifest"),
        ("x = '" + "y" * 9000 + "'", "manifest"),
    ],
)
def test_a_bad_field_is_refused_by_name(toml: str, field: str) -> None:
    with pytest.raises(ManifestError, match=rf"^{field}"):
        Manifest.from_toml(toml)


def test_how_replicas_are_averaged_is_written_and_read_whole() -> None:
    averaging = AveragingConfig(
        target_replicas=3,
        period_s=0.5,
        codec="bf16",
        clip_radius=0.125,
        max_rate_scale=2.0,
        max_staleness=0,
        stale_action="refuse",
    )
    manifest = Manifest(name="a", averaging=averaging)
    text = manifest.to_toml()
    assert Manifest.from_toml(text).averaging == averaging
    assert Manifest.from_toml(text).to_toml() == text
    assert Manifest.from_toml('name = "a"\n[averaging]\nperiod_s = 3').averaging == AveragingConfig(period_s=3.0)
    assert Manifest.from_toml('name = "a"').averaging == AveragingConfig()


def test_a_run_of_another_version_says_which_versions_and_what_to_do() -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_toml('name = "a"\nprotocol_version = 2')
    assert str(caught.value) == (
        "protocol_version: this run speaks 2, this kilohive speaks 4; install the version that the run's owner names"
    )


@given(st.builds(BlockId, st.integers(0, 99_999), st.integers(0, 999_999_999)) | st.just(TRUNK))
def test_a_block_id_is_read_as_it_is_written(block: BlockId) -> None:
    assert parse_block_id(str(block)) == block


@pytest.mark.parametrize(
    "text",
    ["", "0", "0/", "/0", "-1/0", "0/-1", "00/1", "0/01", "0/1/2", "0/1\n", " 0/1", "0/٢", "Trunk", "trunk ", "9" * 50],
)
def test_no_other_text_is_a_block_id(text: str) -> None:
    with pytest.raises(ValueError, match="is not LAYER/BLOCK or trunk") as caught:
        parse_block_id(text)
    assert len(str(caught.value)) < 80


def test_the_trunk_is_no_block_of_the_grid() -> None:
    assert str(TRUNK) == "trunk"
    assert TRUNK not in all_blocks(ModelConfig())


def test_blocks_cover_every_expert_once() -> None:
    model = ModelConfig(experts_per_layer=70, experts_per_block=32, n_layers=3)
    assert len(all_blocks(model)) == 9
    for layer in range(3):
        blocks = [b for b in all_blocks(model) if b.layer == layer]
        assert [e for b in blocks for e in model.block_experts(b.block)] == list(range(70))
    assert str(BlockId(1, 2)) == "1/2"


def test_the_learning_rate_rises_then_falls_to_its_floor() -> None:
    config = OptimizerConfig(warmup_tokens=100, total_tokens=1000, final_lr_fraction=0.1)
    factors = [learning_rate_factor(config, tokens) for tokens in range(0, 1200, 10)]
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert learning_rate_factor(config, 100) == 1.0
    assert learning_rate_factor(config, 1000) == pytest.approx(0.1)
    assert learning_rate_factor(config, 10**9) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("works", "replicas"),
    [((1.0,), 1.0), ((1.0,) * 9, 9.0), ((1.0, 0.0), 1.0), ((1.0, 999.0), 1.0), ((1.0, 2.0), 1.8), ((1.0, 0.5), 1.8)],
)
def test_only_those_who_do_their_part_count_as_replicas(works: tuple[float, ...], replicas: float) -> None:
    assert averaged_replicas(works) == pytest.approx(replicas, rel=0.01)
    assert averaged_rate_scale(works, 100.0) == pytest.approx(replicas**0.5, rel=0.01)


def test_the_rate_grows_no_further_than_the_manifest_says() -> None:
    assert averaged_rate_scale([1.0] * 10_000, 4.0) == 4.0
    assert averaged_rate_scale([1.0] * 10_000, 1.0) == 1.0


def test_an_older_node_is_told_which_version_the_run_needs() -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_toml('name = "a"\nminimum_version = "999"')
    assert str(caught.value) == (
        f"minimum_version: this run needs kilohive 999 or newer, this is {VERSION}; "
        "install the version that the run's owner names"
    )


def test_this_version_and_older_minimums_are_enough() -> None:
    for minimum in ("", "0", VERSION):
        assert Manifest.from_toml(f'name = "a"\nminimum_version = "{minimum}"').minimum_version == minimum


@pytest.mark.parametrize(
    ("one", "other"), [("0.1.0", "0.1.1"), ("0.9", "0.10"), ("1", "1.0.1"), ("0.99.99", "1"), ("1.2.3", "1.2.3.4")]
)
def test_versions_are_compared_number_by_number(one: str, other: str) -> None:
    assert is_older(one, other)
    assert not is_older(other, one)
    assert not is_older(one, f"{one}.0" if one.count(".") < 3 else one)

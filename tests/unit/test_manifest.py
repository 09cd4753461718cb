from __future__ import annotations

import pytest

from protocol.errors import ManifestError
from protocol.manifest import BlockId, Manifest, ModelConfig, OptimizerConfig, all_blocks
from protocol.schedule import learning_rate_factor


def test_a_manifest_survives_its_own_toml() -> None:
    manifest = Manifest(
        name="wiki-1", seed=7, codec="int8", model=ModelConfig(gate="product_key", experts_per_layer=256)
    )
    assert Manifest.from_toml(manifest.to_toml()) == manifest


def test_the_run_id_changes_with_any_field() -> None:
    ids = {Manifest(name="a").run_id, Manifest(name="a", seed=1).run_id, Manifest(name="a", codec="bf16").run_id}
    assert len(ids) == 3
    assert all(run_id.startswith("a-") for run_id in ids)


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
        ('name = "a"\nmodel = 3', "model"),
        ('name = "a"\n[model]\nd_model = 1e3', "model.d_model"),
        ('name = "a"\n[model]\nd_model = 0', "model.d_model"),
        ('name = "a"\n[model]\nd_model = 130', "model.d_model"),
        ('name = "a"\n[model]\nd_model = true', "model.d_model"),
        ('name = "a"\n[model]\nexperts_per_layer = 100000000', "model.experts_per_layer"),
        ('name = "a"\n[model]\nexperts_per_token = 60\nexperts_per_layer = 8', "model.experts_per_token"),
        ('name = "a"\n[model]\ngate = "product_key"\nexperts_per_layer = 500', "model.experts_per_layer"),
        ('name = "a"\n[optimizer]\nlr = nan', "optimizer.lr"),
        ('name = "a"\n[optimizer]\nbeta1 = 1.0', "optimizer.beta1"),
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

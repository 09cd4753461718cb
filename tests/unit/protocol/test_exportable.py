"""A run is exported as a whole or not at all: what an exported model cannot have is named."""

from __future__ import annotations

import pytest

from common.errors import ConfigError
from protocol.exportable import NAMES, check_exportable
from protocol.manifest import Manifest, ModelConfig
from protocol.run_assets import DataConfig, PretrainedConfig, PretrainedFile

DATA = DataConfig(tokenizer="0" * 64, tokenizer_bytes=9)
AROUND = PretrainedConfig(
    files=(PretrainedFile(name="tiny.gguf", sha256="1" * 64, n_bytes=9),),
    attach=(1, 3),
    unfreeze=("model.norm",),
)


@pytest.mark.parametrize(
    "manifest",
    [
        Manifest(name="a"),
        Manifest(name="a", model=ModelConfig(smear=2, capacity_factor=2.0, balance="proportional")),
        Manifest(name="a", seed=7, codec="bf16", model=ModelConfig(vocab_size=300), data=DATA),
        Manifest(name="a", model=ModelConfig(vocab_size=300, trunk="hf"), data=DATA, pretrained=AROUND),
    ],
    ids=["defaults", "settings of training", "tokenizer", "pretrained model"],
)
def test_a_run_is_exported_whatever_its_gate_its_tokens_and_its_training(manifest: Manifest) -> None:
    check_exportable(manifest)


def test_a_field_that_exported_models_do_not_have_may_be_at_its_default_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(NAMES, "smear")
    check_exportable(Manifest(name="a"))
    sentence = r"the manifest's model\.smear is '2', which an exported model cannot have yet: this run cannot be"
    with pytest.raises(ConfigError, match=sentence):
        check_exportable(Manifest(name="a", model=ModelConfig(smear=2)))

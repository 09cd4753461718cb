"""A pretrained model stays as it is; experts beside its FFNs change what it says, read at once or token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from common.assets import asset_store
from common.errors import DataError, InvalidInputError, LimitExceededError, ManifestError
from node.model import pretrained_cache
from node.model.attention_cache import Stretch
from node.model.frozen_states import FrozenStates
from node.model.generation import Generation, Prompt
from node.model.moe import LocalExperts
from node.model.next_token import GenerationConfig
from node.model.pretrained import PretrainedTrunk, decoder_layers
from node.model.pretrained_files import language_model, loaded, quiet_transformers
from node.trainer.train_step import build_model, new_layers, next_token_loss
from tests.support.tiny_pretrained import (
    KINDS,
    N_TOKENS,
    REACH,
    SLIDING,
    new_model,
    pretrained_manifest,
    save_pretrained,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from node.model.experts.block import Block
    from protocol.manifest import Manifest

WINDOW = [5, 17, 299, 3, 42, 42, 8, 100, 7, 256, 31, 9]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOHIVE_CACHE", str(tmp_path / "cache"))
    language_model.cache_clear()


@pytest.fixture(params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_pretrained(tmp_path / "model", request.param)


def manifest_of(folder: Path, **changes: Any) -> Manifest:
    """The run, whose files are kept on this machine."""
    manifest = pretrained_manifest(folder, **changes)
    for file in manifest.pretrained.files:
        asset_store().add_file(folder / file.name)
    return manifest


def trunk_of(manifest: Manifest, *, learnt: bool = True) -> tuple[PretrainedTrunk, LocalExperts]:
    experts = LocalExperts(manifest)
    model = build_model(manifest, experts, torch.Generator().manual_seed(3))
    assert isinstance(model, PretrainedTrunk)
    if learnt:
        teach(model, experts)
    return model.eval(), experts


def teach(model: PretrainedTrunk, experts: LocalExperts, steps: int = 3) -> list[float]:
    """Some steps on one window, so that experts add something; what each loses before its step."""
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = next_token_loss(model, torch.tensor([WINDOW]), torch.device("cpu"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def reference(folder: Path) -> Any:
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits(model: PretrainedTrunk, window: Sequence[int] = WINDOW) -> torch.Tensor:
    logits_TV: torch.Tensor = model(torch.tensor([list(window)]))[0]
    return logits_TV


def test_with_experts_that_have_learnt_nothing_it_says_what_transformers_says(folder: Path) -> None:
    model, _ = trunk_of(manifest_of(folder), learnt=False)
    with torch.no_grad():
        expected = reference(folder)(torch.tensor([WINDOW])).logits[0]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_experts_learn_and_the_pretrained_weights_stay(folder: Path) -> None:
    manifest = manifest_of(folder)
    model, experts = trunk_of(manifest, learnt=False)
    before = logits(model)
    losses = teach(model, experts, 20)
    assert losses[-1] < losses[0] - 0.1
    assert (logits(model) - before).abs().max() > 0.1
    kept = language_model(manifest.pretrained)
    for (name, was), (_, now) in zip(reference(folder).named_parameters(), kept.named_parameters(), strict=True):
        assert torch.equal(was, now), name


def test_experts_stand_beside_the_layers_that_the_run_names_and_nowhere_else(folder: Path) -> None:
    model, experts = trunk_of(manifest_of(folder), learnt=False)
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(decoder_layers(model.language_model)):
        part = layer.get_submodule("mlp")
        part.register_forward_hook(lambda _m, args, _out, number=number: seen.__setitem__(number, args[0]))
    asked: list[tuple[int, torch.Tensor]] = []
    forward = experts.forward

    def forward_that_tells(layer: int, x_TD: torch.Tensor, *rest: Any, **keep: Any) -> Any:
        asked.append((layer, x_TD))
        return forward(layer, x_TD, *rest, **keep)

    experts.forward = forward_that_tells  # type: ignore[method-assign]
    logits(model)
    assert [layer for layer, _ in asked] == [0, 1]
    for (_, x_ND), number in zip(asked, (1, 3), strict=True):
        torch.testing.assert_close(x_ND, seen[number].flatten(0, 1))


RECIPES: dict[str, dict[str, Any]] = {
    "hidden": {},
    "product keys": {"gate": "product_key"},
    "codes": {"gate_reads": "tokens", "gate_heads": 2, "gate_shortest": 2},
    "hash": {"gate": "hash", "gate_reads": "tokens", "gate_heads": 2, "gate_shortest": 1, "unfreeze": ("model.norm",)},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_that_are_read_one_by_one_and_in_company_say_what_the_whole_window_says(
    folder: Path, recipe: str
) -> None:
    model, _ = trunk_of(manifest_of(folder, **RECIPES[recipe]))
    other = [9, 8, 7, 200, 201]
    cache = model.new_cache(2, len(WINDOW))
    assert [cache.add(), cache.add()] == [0, 1]
    with pytest.raises(LimitExceededError, match="sequences"):
        cache.add()
    first = model.read(
        cache, [Stretch(place=0, window=WINDOW, start=0, stop=7), Stretch(place=1, window=other, start=0, stop=2)]
    )
    torch.testing.assert_close(first, torch.stack((logits(model)[6], logits(model, other)[1])), rtol=0, atol=1e-4)
    for step in range(3):
        stretches = [
            Stretch(place=0, window=WINDOW, start=7 + step, stop=8 + step),
            Stretch(place=1, window=other, start=2 + step, stop=3 + step),
        ]
        expected = torch.stack((logits(model)[7 + step], logits(model, other)[2 + step]))
        for _ in range(2):  # a pass that is repeated gives the same
            torch.testing.assert_close(model.read(cache, stretches), expected, rtol=0, atol=1e-4)
    cache.keep([1, 0])
    last = model.read(cache, [Stretch(place=1, window=WINDOW, start=10, stop=12)])
    torch.testing.assert_close(last[0], logits(model)[11], rtol=0, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_long_prompt_is_read_in_a_pass_of_its_own_and_all_get_the_logits_of_their_windows(
    folder: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained_cache, "FREE_PADDING", 0)
    model, experts = trunk_of(manifest_of(folder, **RECIPES[recipe]))
    windows = [WINDOW[:2], WINDOW, WINDOW[3:5]]
    cache = model.new_cache(len(windows), len(WINDOW))
    stretches = [Stretch(place=cache.add(), window=of, start=0, stop=len(of)) for of in windows]
    expected = torch.stack([logits(model, of)[-1] for of in windows])
    read = list[int]()
    monkeypatch.setattr(experts, "blocks_for_call", counting(experts.blocks_for_call, read))
    torch.testing.assert_close(model.read(cache, stretches), expected, rtol=0, atol=1e-4)
    assert len(read) == 2 * 2, "two passes through two layers"


@pytest.mark.parametrize("kind", SLIDING)
def test_layers_that_see_the_last_tokens_see_the_same_where_text_is_read_token_by_token(
    kind: str, tmp_path: Path
) -> None:
    model, _ = trunk_of(manifest_of(save_pretrained(tmp_path / "model", kind)))
    cache = model.new_cache(1, len(WINDOW))
    place = cache.add()
    for start, stop in ((0, REACH + 2), (REACH + 2, REACH + 3), (REACH + 3, len(WINDOW))):
        read = model.read(cache, [Stretch(place=place, window=WINDOW, start=start, stop=stop)])
        torch.testing.assert_close(read[0], logits(model)[stop - 1], rtol=0, atol=1e-4)


def test_a_model_of_which_more_must_be_kept_than_keys_and_values_writes_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = trunk_of(manifest_of(save_pretrained(tmp_path / "model")))
    config = model.language_model.config
    monkeypatch.setattr(config, "layer_types", ["full_attention", "linear_attention"], raising=False)
    with pytest.raises(DataError, match="layers of type linear_attention"):
        model.new_cache(1, 4)


def counting(call: Callable[[int], list[Block]], layers: list[int]) -> Callable[[int], list[Block]]:
    def counted(layer: int) -> list[Block]:
        layers.append(layer)
        return call(layer)

    return counted


def test_it_writes_what_transformers_writes_where_experts_have_learnt_nothing(folder: Path) -> None:
    model, _ = trunk_of(manifest_of(folder), learnt=False)
    config = GenerationConfig(max_new_tokens=8, temperature=0.0)
    written: dict[int, list[int]] = {0: [], 1: []}
    for step in Generation(model, [Prompt(ids=WINDOW, config=config), Prompt(ids=[1, 2], config=config)]):
        for new in step:
            written[new.sequence].append(new.token)
    for sequence, prompt in ((0, WINDOW), (1, [1, 2])):
        expected = reference(folder).generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert written[sequence] == expected[0, len(prompt) :].tolist()


def test_frozen_layers_are_computed_once_for_a_text_and_again_only_where_they_are_trained(folder: Path) -> None:
    lower = "model.layers.0.mlp.down_proj"
    for unfreeze, n_runs in (((), 1), ((lower,), 2)):
        model, _ = trunk_of(manifest_of(folder, unfreeze=unfreeze), learnt=False)
        runs: list[None] = []
        decoder_layers(model.language_model)[0].register_forward_hook(lambda *_, runs=runs: runs.append(None))
        first, again = logits(model), logits(model)
        torch.testing.assert_close(first, again)
        assert len(runs) == n_runs


def test_trunks_of_one_model_that_share_its_states_compute_them_once(folder: Path) -> None:
    manifest, states, runs = manifest_of(folder), FrozenStates(), list[None]()
    for _ in range(2):
        layers = new_layers(manifest, LocalExperts(manifest), torch.Generator().manual_seed(3))
        trunk = PretrainedTrunk(manifest, language_model(manifest.pretrained), layers, torch.Generator(), states)
        decoder_layers(trunk.language_model)[0].register_forward_hook(lambda *_: runs.append(None))
        logits(trunk)
    assert len(runs) == 1


def test_a_checkpoint_holds_what_is_trained_and_another_trunk_takes_it(folder: Path) -> None:
    manifest = manifest_of(folder, unfreeze=("model.norm", "model.layers.3.self_attn.o_proj"))
    model, experts = trunk_of(manifest)
    state = model.state_dict()
    n_frozen = sum(parameter.numel() for parameter in language_model(manifest.pretrained).parameters())
    assert sum(tensor.numel() for tensor in state.values()) < n_frozen
    again = build_model(manifest, experts, torch.Generator().manual_seed(3)).eval()
    assert isinstance(again, PretrainedTrunk)
    assert (logits(again) - logits(model)).abs().max() > 1e-3
    again.load_state_dict(state)
    torch.testing.assert_close(logits(again), logits(model))


def test_trunks_of_one_process_share_the_pretrained_weights(folder: Path) -> None:
    manifest = manifest_of(folder)
    one, other = (trunk_of(manifest, learnt=False)[0].language_model for _ in range(2))
    assert one is not other
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    shared = {name: a.data_ptr() == b.data_ptr() for (name, a), (_, b) in pairs}
    assert {name for name, same in shared.items() if not same} == {name for name in shared if ".moe." in name} != set()


def test_weights_can_be_kept_in_half_of_their_size(folder: Path) -> None:
    model, _ = trunk_of(manifest_of(folder, dtype="bf16"), learnt=False)
    assert {p.dtype for p in model.language_model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.no_grad():
        expected = reference(folder)(torch.tensor([WINDOW])).logits[0]
    assert torch.nn.functional.cosine_similarity(logits(model), expected, dim=1).min() > 0.99


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"d_model": 32}, r"model\.d_model: is 32 in the manifest, the pretrained model has 16"),
        ({"context": 65}, r"model\.context: is 65, the pretrained model reads at most 64 tokens"),
        ({"vocab_size": 301}, r"model\.vocab_size: is 301 in the manifest, the pretrained model has 300"),
        ({"attach": (1, 4)}, r"pretrained\.attach: names layer 4, the pretrained model has 4, counted from 0"),
        ({"unfreeze": ("lm_tail",)}, r"pretrained\.unfreeze: no parameter of the pretrained model begins with lm_tail"),
    ],
)
def test_a_manifest_of_another_model_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    manifest = manifest_of(save_pretrained(tmp_path / "model"), **changes)
    with pytest.raises(DataError, match=sentence):
        build_model(manifest, LocalExperts(manifest), torch.Generator())


def test_what_would_train_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"pretrained\.unfreeze: must name what trainers train where gate is hash"):
        manifest_of(save_pretrained(tmp_path / "model"), gate="hash", gate_reads="tokens")


def test_rounded_parameters_are_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"pretrained\.dtype: must be fp32 where parameters are unfrozen, is bf16"):
        manifest_of(save_pretrained(tmp_path / "model"), dtype="bf16", unfreeze=("model.norm",))


def test_a_window_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, _ = trunk_of(manifest_of(save_pretrained(tmp_path / "model")), learnt=False)
    with pytest.raises(InvalidInputError, match="1 to 32 tokens"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(LimitExceededError, match="keys and values"):
        model.new_cache(1 << 24, 32)


def test_files_that_are_missing_damaged_or_no_model_are_refused(tmp_path: Path) -> None:
    manifest = manifest_of(save_pretrained(tmp_path / "model"))
    weights = next(file for file in manifest.pretrained.files if file.name == "model.safetensors")
    asset_store().path(weights.asset).write_bytes(b"no weights")
    with pytest.raises(DataError, match=r"model\.safetensors of the run's pretrained model is not on this machine"):
        language_model(manifest.pretrained)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="no causal language model that transformers loads"):
        loaded(tmp_path / "model", ["config.json", "model.safetensors"], torch.float32)


def test_a_model_whose_layers_cannot_be_told_is_refused() -> None:
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=N_TOKENS, n_positions=16)
    model = new_model(config)
    assert len(decoder_layers(model)) == 2
    del model.transformer.h[0].mlp
    with pytest.raises(DataError, match="the layers of GPT2LMHeadModel cannot be told"):
        decoder_layers(model)


def test_a_model_of_a_folder_keeps_its_files_whatever_else_is_there(tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path / "model")
    manifest = manifest_of(folder)
    renamed = replace(manifest.pretrained.files[0], name="other.json")
    with pytest.raises(DataError):
        language_model(replace(manifest.pretrained, files=(renamed,)))

"""The trunk: causal, reproducible, the same in threads as alone, learns, and generates."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import InvalidInputError, ManifestError
from node.model.gate import build_gate
from node.model.generation import Generation, Prompt
from node.model.next_token import GenerationConfig
from node.model.rope import rope_rotation
from node.model.transformer import (
    CausalAttention,
    DenseFfn,
    Transformer,
    TransformerLayer,
    bits_per_byte,
)
from protocol.manifest import ModelConfig

TINY = ModelConfig(d_model=16, n_layers=2, n_heads=2, context=24)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_model(model: ModelConfig = TINY, seed: int = 0) -> Transformer:
    generator = seeded(seed)
    ffns = [DenseFfn(model.d_model, 2 * model.d_model, generator) for _ in range(model.n_layers)]
    return Transformer(model, ffns, generator)


def some_ids(batch: int = 3, length: int = 24, seed: int = 5) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=seeded(seed))


def loss_of(model: Transformer, ids_BT1: Tensor) -> Tensor:
    logits_BTV = model(ids_BT1[:, :-1])
    return functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT1[:, 1:].flatten())


def test_gives_one_row_of_logits_per_byte_and_starts_near_uniform() -> None:
    model, ids = dense_model(), some_ids(8, 25)
    assert model(ids[:, :-1]).shape == (8, 24, 256)
    assert bits_per_byte(float(loss_of(model, ids).detach())) == pytest.approx(8.0, abs=0.2)


def test_parameters_have_the_shapes_of_the_manifest_and_include_the_moe_layers() -> None:
    model = dense_model()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert shapes["embedding_VD"] == shapes["head_VD"] == (256, 16)
    assert shapes["layers.1.attention.qkv_weight"] == (48, 16)
    assert shapes["layers.1.attention.query_norm.weight"] == (8,)
    assert shapes["layers.1.moe.in_weight"] == (32, 16)
    assert sum(value.numel() for value in model.parameters()) == 2 * (256 * 16) + 16 + 2 * (4 * 256 + 16 + 32 + 1072)
    assert model.moe_layers == tuple(layer.get_submodule("moe") for layer in model.layers)


def test_a_later_byte_never_changes_an_earlier_logit_and_does_change_its_own() -> None:
    model, ids = dense_model().double(), some_ids()
    before = model(ids)
    for position in (1, 11, 23):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 256
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-12)
        assert (after[:, position:] - before[:, position:]).abs().amax(dim=(0, 2)).min() > 1e-6


def test_a_sequences_logits_do_not_depend_on_its_neighbours_in_the_batch() -> None:
    model, ids = dense_model().double(), some_ids()
    torch.testing.assert_close(model(ids)[1:2], model(ids[1:2]), rtol=0, atol=1e-12)


def test_attention_sees_distances_not_positions() -> None:
    generator = seeded()
    attention = CausalAttention(TINY, generator).double()
    x_BTD = torch.randn(2, 10, 16, generator=generator, dtype=torch.float64)
    cos_TC, sin_TC = rope_rotation(30, 8, x_BTD)
    early, late = ((cos_TC[start : start + 10], sin_TC[start : start + 10]) for start in (0, 17))
    torch.testing.assert_close(attention(x_BTD, early), attention(x_BTD, late), rtol=0, atol=1e-12)


def test_attention_sees_the_order_of_the_past() -> None:
    generator = seeded()
    attention = CausalAttention(TINY, generator).double()
    x_BTD = torch.randn(1, 10, 16, generator=generator, dtype=torch.float64)
    rotation = rope_rotation(10, 8, x_BTD)
    swapped_BTD = x_BTD[:, [0, 1, 7, 3, 4, 5, 6, 2, 8, 9]]
    assert (attention(x_BTD, rotation) - attention(swapped_BTD, rotation))[:, -1].abs().max() > 1e-3


class _Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x_ND: Tensor) -> Tensor:
        return torch.full_like(x_ND, self.value)


def test_what_the_experts_give_is_added_to_the_tokens() -> None:
    # Tokens whose experts all failed (0) go on as they were.
    ids, outputs = some_ids(), []
    for value in (0.0, 0.5):
        layer = TransformerLayer(TINY, _Constant(value), seeded()).double()
        x_BTD = functional.embedding(ids, torch.randn(256, 16, generator=seeded(), dtype=torch.float64))
        rotation = rope_rotation(24, 8, x_BTD)
        outputs.append(layer(x_BTD, rotation))
        expected_BTD = x_BTD + layer.attention(layer.attention_norm(x_BTD), rotation) + value
        torch.testing.assert_close(outputs[-1], expected_BTD, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[1] - outputs[0], torch.full_like(outputs[0], 0.5))


def test_one_seed_gives_one_model_whatever_the_global_generator_does() -> None:
    torch.manual_seed(1)
    first = dense_model(seed=7)
    torch.manual_seed(2)
    second, other = dense_model(seed=7), dense_model(seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head_VD, other.head_VD)


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    dense_model()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_float64_starts_from_the_same_weights_and_agrees_with_float32() -> None:
    single, double, ids = dense_model(), dense_model().double(), some_ids()
    logits = double(ids)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(single(ids).double(), logits, rtol=1e-4, atol=1e-5)


def test_takes_bytes_as_uint8_too() -> None:
    model, ids = dense_model(), some_ids()
    assert torch.equal(model(ids.to(torch.uint8)), model(ids))


def test_every_parameter_passes_gradcheck() -> None:
    config = ModelConfig(d_model=4, n_layers=1, n_heads=2, context=4)
    model, ids = dense_model(config).double(), some_ids(1, 4)
    names, values = zip(*model.named_parameters(), strict=True)

    def logits(*parameters: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (ids,))
        return out[..., :3]  # three of the 256 logits say as much, in a hundredth of the time

    assert torch.autograd.gradcheck(logits, values, fast_mode=True)


def test_overfits_a_short_text() -> None:
    text = b"the swarm trains one model out of many tiny experts. " * 2
    model = dense_model(ModelConfig(d_model=32, n_layers=2, n_heads=2, context=52))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    windows = torch.tensor([list(text[start : start + 53]) for start in range(0, 53, 4)])
    for _ in range(120):
        optimizer.zero_grad()
        loss = loss_of(model, windows)
        loss.backward()
        optimizer.step()
    assert bits_per_byte(float(loss_of(model, windows).detach())) < 0.4
    greedy = GenerationConfig(max_new_tokens=40, temperature=0.0)
    steps = Generation(model, [Prompt(ids=b"the swarm trains", config=greedy)])
    assert bytes(new.token for (new,) in steps) == b" one model out of many tiny experts. the"


class _GatedFfn(nn.Module):
    """A gate in front of two matrices, so that threads share a real gate within the trunk."""

    def __init__(self, model: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.gate = build_gate(model, generator)
        self.experts_EDD = nn.Parameter(torch.randn(4, 16, 16, generator=generator) * 0.25)

    def forward(self, x_ND: Tensor) -> Tensor:
        output = self.gate(x_ND)
        chosen_NKDD = self.experts_EDD[output.expert_ids_TK.clamp(min=0)]
        return torch.einsum("nd,nkde,nk->ne", x_ND, chosen_NKDD, output.weights_TK)


def test_threads_running_micro_batches_at_once_get_what_each_gets_alone() -> None:
    config = ModelConfig(d_model=16, n_layers=2, n_heads=2, context=24, experts_per_layer=4, experts_per_token=2)
    generator = seeded()
    model = Transformer(config, [_GatedFfn(config, generator) for _ in range(2)], generator).double()
    parameters = list(model.parameters())
    micro_batches = [some_ids(4, 25, seed) for seed in range(8)]

    def gradients(ids_BT1: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(model, ids_BT1), parameters)

    alone = [gradients(ids) for ids in micro_batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradients, micro_batches))
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(2, 25), (2, 0), (24,)])
def test_ids_that_do_not_fit_are_refused_with_their_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"ids_BT.*1 to 24 tokens"):
        dense_model()(torch.zeros(shape, dtype=torch.int64))


def test_a_model_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"d_model = 20 must be a multiple of 2 \* n_heads = 8"):
        dense_model(ModelConfig(d_model=20, n_heads=4))
    with pytest.raises(InvalidInputError, match="holds 1 layers; the manifest says n_layers = 2"):
        Transformer(TINY, [DenseFfn(16, 4, seeded())], seeded())


def test_bits_per_byte_is_nats_over_log_two() -> None:
    assert bits_per_byte(math.log(256)) == pytest.approx(8.0)

"""The layer inside training scripts as people write them: types, copies, compilers, mistakes. Over real gRPC."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import InvalidInputError
from node.rpc import expert_codec
from node.trainer.remote_moe import RemoteMoE
from protocol.manifest import all_blocks
from tests.support.swarm_parts import TestSwarm, running_swarm, small_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

D = 16
MANIFEST = small_manifest(optimizer={"expert_lr": 1e-2, "total_tokens": 1_000_000, "warmup_tokens": 1})


@pytest.fixture(scope="module")
def swarm() -> Iterator[TestSwarm]:
    with running_swarm(MANIFEST, n_hosts=2) as swarm:
        RemoteMoE(swarm.dispatcher, 0, torch.Generator().manual_seed(5))(tokens(100))  # connects to all hosts
        yield swarm


@pytest.fixture
def moe(swarm: TestSwarm) -> Iterator[RemoteMoE]:
    """The layer; when the test is over, no host has been held responsible for anything."""
    failed = swarm.dispatcher.calls_failed
    yield RemoteMoE(swarm.dispatcher, 0, torch.Generator().manual_seed(5))
    assert swarm.dispatcher.calls_failed == failed
    assert bool(swarm.dispatcher.live_experts(0).all())


def tokens(n: int = 10, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def versions(swarm: TestSwarm) -> list[int]:
    return [swarm.block(block).version for block in all_blocks(MANIFEST.model) if block.layer == 0]


def learns(model: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
    """One forward and backward; the output."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD = model(x_TD)
    y_TD.float().square().mean().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.dtype == x_TD.dtype
    assert bool(x_TD.grad.isfinite().all())
    assert bool(x_TD.grad.any())
    return y_TD.detach()


BAD: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "NaN": (lambda x: x[3, 5].fill_(torch.nan), "x of MoE layer 0: holds NaN or infinity"),
    "infinity": (lambda x: x[0].fill_(-torch.inf), "x of MoE layer 0: holds NaN or infinity"),
    "huge": (lambda x: x.fill_(1e30), r"x of MoE layer 0 magnitude: is 1\.0+\d*e\+30, but the limit is 1e\+18"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_an_input_that_no_host_would_take_is_an_error_about_x_and_asks_nobody(
    moe: RemoteMoE, swarm: TestSwarm, name: str
) -> None:
    spoil, sentence = BAD[name]
    x_TD = tokens()
    spoil(x_TD)
    asked = swarm.dispatcher.calls_ok
    with pytest.raises(InvalidInputError, match=sentence):
        moe(x_TD)
    assert swarm.dispatcher.calls_ok == asked
    assert moe.balance() == 0
    learns(moe, tokens())


def test_an_input_of_another_width_is_an_error_that_names_both(moe: RemoteMoE) -> None:
    with pytest.raises(InvalidInputError, match=r"has shape \(10, 17\); this gate takes \(tokens, 16\)"):
        moe(torch.randn(10, 17))


def test_a_gate_that_has_diverged_is_an_error_about_the_gate(moe: RemoteMoE) -> None:
    with torch.no_grad():
        next(moe.gate.parameters()).fill_(torch.nan)
    with pytest.raises(InvalidInputError, match="gate weights of MoE layer 0: holds NaN or infinity"):
        moe(tokens())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_gradient_that_no_host_would_take_steps_nothing_and_is_seen_by_who_scales_losses(
    moe: RemoteMoE, swarm: TestSwarm, value: float
) -> None:
    before, x_TD = versions(swarm), tokens().requires_grad_()
    (moe(x_TD).sum() * value).backward()
    assert versions(swarm) == before
    assert x_TD.grad is not None
    assert bool(x_TD.grad.isnan().all())
    assert all(p.grad is not None and bool(p.grad.isnan().any()) for p in moe.parameters())
    learns(moe, tokens())
    assert versions(swarm) != before


def test_more_tokens_than_one_call_may_carry_go_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD = tokens(200)
    with running_swarm(MANIFEST, n_hosts=1) as swarm:
        whole = learns(RemoteMoE(swarm.dispatcher, 0, torch.Generator().manual_seed(5)), x_TD)
        assert swarm.dispatcher.calls_ok == 2
    monkeypatch.setattr(expert_codec, "MAX_TOKENS", 64)  # of the host's checks, too
    with running_swarm(MANIFEST, n_hosts=1) as swarm:
        parts = learns(RemoteMoE(swarm.dispatcher, 0, torch.Generator().manual_seed(5)), x_TD)
        assert (swarm.dispatcher.calls_ok, swarm.dispatcher.calls_failed) == (8, 0)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("convert", [True, False], ids=["model of that type", "input of that type"])
def test_the_output_has_the_inputs_type_and_nearly_the_same_values(
    moe: RemoteMoE, swarm: TestSwarm, dtype: torch.dtype, *, convert: bool
) -> None:
    with torch.no_grad():
        reference = moe(tokens(dtype=dtype).float())
        y_TD = (moe.to(dtype) if convert else moe)(tokens(dtype=dtype))
    assert y_TD.dtype == dtype
    # Rounded keys may choose other experts for a token or two.
    near_T = (y_TD.float() - reference).abs().amax(1) < 0.05 * reference.abs().max()
    assert near_T.float().mean() >= 0.8
    learns(moe, tokens(dtype=dtype))


def test_under_autocast_it_returns_what_nn_linear_would_and_computes_as_without(moe: RemoteMoE) -> None:
    x_TD, linear = tokens(), nn.Linear(D, D)
    with torch.no_grad():
        reference = moe(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = learns(nn.Sequential(nn.Identity(), moe), x_TD)
        assert y_TD.dtype == linear(x_TD).dtype == torch.bfloat16
    torch.testing.assert_close(y_TD, reference.bfloat16(), rtol=0, atol=0.3)


def test_a_compiled_model_calls_it_between_two_graphs(moe: RemoteMoE) -> None:
    torch._dynamo.reset()  # what earlier tests compiled
    model = nn.Sequential(nn.Linear(D, D), moe, nn.Linear(D, D))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens()), model(tokens()))
    learns(compiled, tokens())


def test_a_deep_copy_shares_the_swarm_and_nothing_else(moe: RemoteMoE, swarm: TestSwarm) -> None:
    ema = copy.deepcopy(nn.Sequential(nn.Linear(D, D), moe))
    copied = ema[1]
    assert isinstance(copied, RemoteMoE)
    learns(moe, tokens())
    assert copied.balance() == 0
    assert all(p.grad is None for p in ema.parameters())
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert bool(next(moe.parameters()).any())
    asked = swarm.dispatcher.calls_ok
    learns(ema, tokens())
    assert swarm.dispatcher.calls_ok > asked


def test_pickling_it_whole_says_what_to_save(moe: RemoteMoE) -> None:
    with pytest.raises(TypeError, match=r"connected to a swarm: save the model's state_dict\(\)"):
        pickle.dumps(moe)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(*, reentrant: bool) -> None:
    gradients = []
    with running_swarm(small_manifest(optimizer={"expert_lr": 0.0}), n_hosts=1) as swarm:
        moe = RemoteMoE(swarm.dispatcher, 0, torch.Generator().manual_seed(5))
        for checkpointed in (False, True):
            x_TD = tokens().requires_grad_()
            y_TD = checkpoint(moe, x_TD, use_reentrant=reentrant) if checkpointed else moe(x_TD)
            assert isinstance(y_TD, torch.Tensor)
            y_TD.sum().backward()
            gradients.append(x_TD.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_accumulated_gradients_add_up_and_threads_may_share_the_layer(moe: RemoteMoE) -> None:
    parts = tokens(40).chunk(4)
    for part in parts:
        learns(moe, part)
    threads = [threading.Thread(target=learns, args=(moe, part)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in moe.parameters())
    assert moe.gate.stats().n_live == 0
    moe.balance()
    assert moe.gate.stats().n_live == MANIFEST.model.experts_per_layer

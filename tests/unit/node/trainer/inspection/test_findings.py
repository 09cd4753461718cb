"""What is found in a model whose experts were made for something, and what is lost without them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from common.errors import DivergedError
from common.tokenizer import ByteTokenizer
from node.data.topics import WindowTopics
from node.model.gate import Gate
from node.trainer.inspection.ablation import Ablation, Rise, groups_to_take, n_passes, singles_to_take
from node.trainer.inspection.findings import InspectionConfig, LayerChoices, findings
from node.trainer.inspection.plot import figure_of
from node.trainer.inspection.reading import MAX_BATCH, MAX_LOGITS, Reader, batch_of
from node.trainer.inspection.show import Inspected, findings_json, render_findings
from tests.support.counted_experts import counted_model

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from node.model.transformer import Transformer
    from node.trainer.inspection.findings import Findings
    from protocol.manifest import ModelConfig

N_WINDOWS, CONTEXT, N_EXPERTS = 40, 16, 16
MADE_FOR = {ord("q"): (3, 3), ord("z"): (5, 6)}
"""Experts of a token; all others have two of 0 to 2, and nobody has those from 7 on."""


class MadeGate(Gate):
    """Chooses by the token itself, which it is told before each forward."""

    def __init__(self, model: ModelConfig, trunk: torch.nn.Module) -> None:
        super().__init__(model)
        self.score = "softmax"
        self._token_T = torch.zeros(0, dtype=torch.int64)
        trunk.register_forward_pre_hook(self._take)

    def _take(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._token_T = inputs[0].flatten()

    def choose(self, x_TD: torch.Tensor, live_E: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        ids_TK = torch.stack([self._token_T % 3, (self._token_T + 1) % 3], dim=1)
        for token, experts in MADE_FOR.items():
            ids_TK[self._token_T == token] = torch.tensor(experts)
        return ids_TK, torch.zeros_like(ids_TK, dtype=x_TD.dtype)


def made_model() -> Transformer:
    model, experts = counted_model(gate="topk")
    for layer in model.moe_layers:
        layer.gate = MadeGate(experts.manifest.model, model).double()
    return model


def windows() -> torch.Tensor:
    """Texts of a few letters; those of the second half have a z in them, as no other has."""
    letters = torch.tensor(list(b"abcdefgq "))
    ids_NT = letters[torch.randint(len(letters), (N_WINDOWS, CONTEXT + 1), generator=torch.Generator().manual_seed(1))]
    ids_NT[N_WINDOWS // 2 :, ::4] = ord("z")
    return ids_NT


TOPICS = WindowTopics(names=("first", "second"), of_window_N=np.repeat([0, 1], N_WINDOWS // 2))


class Steps:
    """Counts batches."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self) -> None:
        self.done += 1


def found_in(model: Transformer, topics: WindowTopics | None = TOPICS, ablate: int = 0) -> Findings:
    live = [torch.ones(N_EXPERTS, dtype=torch.bool)] * 2
    config = InspectionConfig(ablate=ablate, seed=0)
    return findings(Reader(model, windows(), Steps()), ByteTokenizer(), topics, live, config)


@pytest.fixture(scope="module")
def found() -> Findings:
    return found_in(made_model(), ablate=N_EXPERTS)


def test_an_expert_that_is_chosen_for_one_token_is_found_with_its_places(found: Findings) -> None:
    for layer in found.layers:
        by_number = {expert.expert: expert for expert in layer.experts}
        (token,) = by_number[3].tokens
        assert (token.text, token.share) == ("q", 1.0)
        assert {context.token for context in by_number[3].contexts} == {"q"}
        assert [token.text for token in by_number[5].tokens] == ["z"]
        assert by_number[5].topics[0].text == "second"
        assert by_number[5].topics[0].times > 1.9


def test_loads_are_counted_and_compared_with_the_layers_mean(found: Findings) -> None:
    ids_NT = windows()[:, :-1]
    for layer in found.layers:
        assert sum(layer.loads) == 2 * ids_NT.numel() == 2 * found.tokens
        assert layer.loads[3] == 2 * int((ids_NT == ord("q")).sum())
        assert layer.loads[5] == layer.loads[6] == int((ids_NT == ord("z")).sum())
        assert not any(layer.loads[7:])
        assert layer.loads[4] == 0
        assert [expert.pairs for expert in layer.experts] == sorted(layer.loads, reverse=True)
        assert layer.experts[0].load == pytest.approx(max(layer.loads) / np.mean(layer.loads))
        assert layer.stats.dead_fraction == 10 / 16
        assert layer.stats.effective_k == pytest.approx(2.0)


def test_experts_that_go_by_the_topic_tell_of_it_more_than_shuffled_topics_do(found: Findings) -> None:
    for layer in found.layers:
        about = layer.about_topics
        assert about is not None
        assert about.bits > about.high > about.by_chance > about.low > 0.0


def test_topics_that_mean_nothing_are_told_of_no_more_than_by_chance() -> None:
    model = made_model()
    for seed in range(3):
        label_N = np.random.default_rng(seed).integers(2, size=N_WINDOWS)
        for layer in found_in(model, WindowTopics(names=("heads", "tails"), of_window_N=label_N)).layers:
            assert layer.about_topics is not None
            assert abs(layer.about_topics.excess) < 0.01


@pytest.mark.parametrize("topics", [None, WindowTopics(names=("",), of_window_N=np.zeros(N_WINDOWS, dtype=np.int64))])
def test_a_text_of_one_source_has_no_topics_to_tell_of(topics: WindowTopics | None) -> None:
    found = found_in(made_model(), topics)
    assert found.topics == ()
    assert all(layer.about_topics is None for layer in found.layers)
    assert not any(expert.topics for layer in found.layers for expert in layer.experts)


def test_what_is_lost_without_an_expert_is_the_loss_without_it_less_the_loss_with_it(found: Findings) -> None:
    model, layer = made_model(), found.layers[1]
    expert = next(expert for expert in layer.experts if expert.expert == 1)
    assert expert.without is not None

    def lost(gate: torch.nn.Module, inputs: object, output: Any) -> Any:
        ids_TK = output.expert_ids_TK
        weights_TK = output.weights_TK * (ids_TK != 1)
        return replace(
            output,
            expert_ids_TK=ids_TK.masked_fill(ids_TK == 1, -1),
            weights_TK=weights_TK / weights_TK.sum(1, keepdim=True),
        )

    whole = nats(model)
    gate: Any = model.moe_layers[1].gate
    gate.register_forward_hook(lost)
    assert expert.without.nats == pytest.approx(nats(model) - whole, rel=1e-6)
    assert expert.without.nats != 0.0


def nats(model: Transformer) -> float:
    ids_NT = windows()
    with torch.no_grad():
        logits_BTV = model(ids_NT[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_NT[:, 1:].flatten()))


def test_an_expert_that_nobody_chooses_costs_exactly_nothing(found: Findings) -> None:
    for layer in found.layers:
        idle = [expert for expert in layer.experts if expert.expert in {4, *range(7, 16)}]
        assert len(idle) == 10
        assert [expert.without for expert in idle] == [Rise(nats=0.0, half_width=0.0)] * 10


def test_text_in_which_an_expert_is_not_chosen_is_not_read_again() -> None:
    model, steps = made_model(), Steps()
    reader = Reader(model, windows(), steps)
    reading = reader.read()
    assert steps.done == reader.n_batches == 3
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    nothing = np.zeros(0, dtype=np.int64)
    assert not reader.rises(reading, [np.array([9]), nothing]).any()
    assert (len(forwards), steps.done) == (0, 6)
    rise_N = reader.rises(reading, [np.array([5]), nothing])
    assert len(forwards) == 2, "the first batch has no z"
    assert not rise_N[: N_WINDOWS // 2].any()
    assert rise_N[N_WINDOWS // 2 :].all()


def test_groups_are_taken_of_all_layers_and_all_experts_of_each(found: Findings) -> None:
    assert [(group.taken, group.experts) for group in found.groups] == [
        ("1% at random", 1), ("10% at random", 2), ("the busiest 1%", 1), ("the idler half", 8),
        ("all of layer 0", 16), ("all of layer 1", 16),
    ]  # fmt: skip
    assert found.groups[3].rise.nats == 0.0, "the idler half was not chosen"
    assert found.groups[4].rise.half_width > 0.0


def test_single_experts_are_the_busiest_and_others_at_random() -> None:
    load_E = np.array([5, 1, 9, 0, 3, 2])
    taken = singles_to_take(load_E, 2, np.random.default_rng(0))
    assert taken[:2] == [2, 0]
    assert len(set(taken)) == 4
    assert sorted(singles_to_take(load_E, 4, np.random.default_rng(0))) == [0, 1, 2, 3, 4, 5]
    assert singles_to_take(load_E, 0, np.random.default_rng(0)) == []


def test_a_seed_takes_the_same_groups_and_passes_are_foretold() -> None:
    loads = [np.arange(100)] * 2
    first, second = (list(groups_to_take(loads, 3)) for _ in range(2))
    assert all(
        np.array_equal(a, b) for (_, x), (_, y) in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert n_passes(2, 100, 3) == 2 * 6 + 2 + len(first)
    assert n_passes(2, 4, 3) == 2 * 4 + 2 + len(first)
    assert n_passes(2, 100, 0) == 0


def test_experts_that_are_away_are_no_part_of_the_mean() -> None:
    model = made_model()
    reading = Reader(model, windows(), Steps()).read()
    live_E = torch.arange(N_EXPERTS) < 8
    layer = LayerChoices(reading, 0, live_E, None)
    assert layer.stats().n_live == 8
    busiest = layer.experts(ByteTokenizer(), {}, 1)
    assert [expert.load for expert in busiest] == [pytest.approx(max(layer.load_E) * 8 / sum(layer.load_E))]


def test_choices_that_found_no_expert_count_for_none() -> None:
    reading = Reader(made_model(), windows(), Steps()).read()
    chosen = np.where(reading.chosen[0] == 3, -1, reading.chosen[0])
    layer = LayerChoices(replace(reading, chosen=(chosen,)), 0, torch.ones(N_EXPERTS, dtype=torch.bool), TOPICS)
    assert layer.load_E[3] == 0
    found = {expert.expert: expert for expert in layer.experts(ByteTokenizer(), {}, N_EXPERTS)}
    assert [token.text for token in found[5].tokens] == ["z"]
    assert {context.token for context in found[5].contexts} == {"z"}
    assert layer.information(np.random.default_rng(0)) is not None


def test_a_batch_is_bounded_by_its_logits() -> None:
    assert batch_of(128, 256) == MAX_BATCH
    assert batch_of(256, 49_152) == MAX_LOGITS // (256 * 49_152) == 5
    assert batch_of(4096, 262_144) == 1


def test_a_model_whose_loss_is_no_number_is_refused() -> None:
    model = made_model()
    with torch.no_grad():
        model.head_VD.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the loss on the held-out text is no finite number"):
        Reader(model, windows(), Steps()).read()


INSPECTED = Inspected(
    model="models/run",
    age="version 7 of its trunk",
    gate="topk",
    experts_per_layer=N_EXPERTS,
    experts_per_token=2,
    text="a text",
    bytes_per_token=2.0,
)


def shown(renderable: RenderableType, width: int = 80) -> str:
    from rich.console import Console  # noqa: PLC0415

    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_busiest_experts_are_shown_within_a_terminals_width(found: Findings) -> None:
    text = shown(render_findings(INSPECTED, found, top=6))
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("models/run at version 7 of its trunk\n2 layers of 16 experts, 2 per token by topk\n")
    assert "640 held-out tokens of a text in 40 windows" in text
    assert "layer 1: 10 of 16 experts never chosen" in " ".join(text.split())
    assert "'q' 100%" in text
    assert "second 100% 2x" in text
    assert "«q»" in text
    assert text.count("the idler half") == 1


def test_experts_that_have_no_host_are_counted(found: Findings) -> None:
    first, second = found.layers
    away = replace(found, layers=(replace(first, stats=replace(first.stats, n_live=12)), second))
    text = " ".join(shown(render_findings(INSPECTED, away, top=1)).split())
    assert "layer 0: 10 of 16 experts never chosen (4 have no host), the busiest" in text
    assert "layer 1: 10 of 16 experts never chosen, the busiest" in text


def test_without_an_ablation_nothing_is_said_of_losses() -> None:
    text = shown(render_findings(INSPECTED, found_in(made_model()), top=1))
    assert "without it" not in text
    assert "taken away" not in text


def test_what_a_text_would_have_a_terminal_do_is_not_done(found: Findings) -> None:
    hostile = "\x1b[2J\x9b31m\r\u202e\x07[bold]\n"
    layer = found.layers[0]
    expert = layer.experts[0]
    context = replace(expert.contexts[0], before=hostile, token=hostile, after=hostile)
    token = replace(expert.tokens[0], text=hostile)
    topic = replace(token, times=9.0)
    expert = replace(expert, tokens=(token,), topics=(topic,), contexts=(context,))
    changed = replace(found, layers=(replace(layer, experts=(expert,)),))
    text = shown(render_findings(replace(INSPECTED, text=hostile, model=hostile), changed, top=1), width=200)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert r"\x1b[2J\x9b31m\r" in text
    assert "[bold]" in text, "it is no markup"


def test_the_file_has_everything_in_units_that_are_named(found: Findings) -> None:
    told = json.loads(findings_json(INSPECTED, found))
    assert told["format"] == 1
    assert told["bits_per_byte"] == pytest.approx(found.nats / np.log(2) / 2.0)
    assert told["inspected"]["experts_per_layer"] == N_EXPERTS
    assert [len(layer["experts"]) for layer in told["layers"]] == [N_EXPERTS] * 2
    assert "loads" not in told["layers"][0]
    assert told["groups"][0]["taken"] == "1% at random"
    assert found.layers[0].experts[0].without is not None
    assert told["layers"][0]["experts"][0]["without"]["nats"] == found.layers[0].experts[0].without.nats


def test_a_large_model_is_told_of_by_its_busiest_experts_and_those_that_were_taken_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("node.trainer.inspection.findings.MAX_EXPERTS_TOLD", 4)
    found = found_in(made_model(), ablate=3)
    for layer in found.layers:
        measured = [expert for expert in layer.experts if expert.without is not None]
        assert len(measured) == 6
        assert len(layer.experts) <= 2 + len(measured)
    assert all(len(layer.loads) == N_EXPERTS for layer in found.layers)


def test_the_plot_has_a_panel_for_what_was_measured(found: Findings, tmp_path: Path) -> None:
    from common.figures import save_svg  # noqa: PLC0415

    assert len(figure_of(found, 1.0).axes) == 3
    assert len(figure_of(replace(found, groups=()), 1.0).axes) == 2
    figure = figure_of(
        replace(
            found_in(made_model(), None),
            groups=(Ablation(taken="one", experts=1, rise=Rise(nats=0.1, half_width=0.0)),),
        ),
        1.0,
    )
    assert len(figure.axes) == 2
    save_svg(figure, tmp_path / "found.svg")
    drawn = (tmp_path / "found.svg").read_bytes()
    save_svg(figure, tmp_path / "found.svg")
    assert (tmp_path / "found.svg").read_bytes() == drawn
    assert b"<svg" in drawn

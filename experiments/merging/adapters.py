"""Claim 5 on the adapters of claim 4: merges of adapters that were trained apart, against routing between them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.pretrained_source import SMOLLM2
from experiments.adapters.adapting import (
    AdapterGrid,
    AdapterRun,
    n_tokens,
    nats_per_token,
    train_adapters,
    train_apart,
)
from experiments.adapters.apart import Whole, arrow, products
from experiments.adapters.domains import WEAK, read_domain
from experiments.adapters.experiment import FULL as ADAPTERS
from experiments.adapters.experiment import SMALL, WHOLE
from experiments.adapters.seed import TextPlan, open_texts
from experiments.arms.arm import Cost
from experiments.harness.experiment import Trial
from experiments.merging.evaluator import MergeEvaluator, chosen_between, unsearched, ways_apart
from experiments.merging.experiment import MergingExperiment
from experiments.merging.report import POSTERIOR, MergingResults, Wording
from experiments.merging.search import POPULATION, MergeSearch
from node.model.pretrained import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.adapters.adapting import Adapters
    from experiments.adapters.seed import Seed, Texts
    from experiments.harness.experiment import Preset, Result, TrialContext
    from experiments.merging.merges import Weights
    from node.model.pretrained import PretrainedTrunk

RATES = {"further": 3e-2, "less-far": 1e-2}
"""Rates by kind: the best one where each adapter has its own domain or they are averaged, and where Arrow
chooses."""

TOGETHER = {"one-for-all": WHOLE, "8-of-256": SMALL}
RATE_TOGETHER = RATES["further"]

SEED_ALONE = "the seed alone"
ONE_FOR_ALL, GATED = "one adapter for all", "8 of 256 adapters"
ARROW_ONE, ARROW_ALL, TOLD = "Arrow chooses 1", "Arrow weighs all 3", "one, told the domain"
ROWS = {"one-for-all": ONE_FOR_ALL, "8-of-256": GATED}
WORDS = Wording(
    unit="token",
    kinds={kind: f"learnt at {rate:g}" for kind, rate in RATES.items()},
    base=SEED_ALONE,
    base_words=SEED_ALONE,
    together={ONE_FOR_ALL: "one adapter trained on all", GATED: "8 of 256 adapters trained with their gate"},
    rivals={
        ARROW_ONE: "Arrow, which chooses one for each token, is",
        POSTERIOR: "the adapters as an ensemble by the posterior, at {models} times the FLOPs, are",
        TOLD: "the adapter of the text's own domain, told which it is, is",
    },
    model="What is above the layers that are never adapted, without adapters,",
    training_passes=2,
    length="length of what an adapter learnt (Frobenius norm over its layers)",
)


@dataclass(frozen=True, kw_only=True)
class AdapterMergePlan:
    """`evaluations` of each search."""

    text: TextPlan
    seeds: int
    evaluations: int

    def trials(self, seed: int) -> list[Trial]:
        """What is trained on everything; then adapters trained apart, and all that is made of them."""
        together = [self._trial(kind, grid, RATE_TOGETHER, seed) for kind, grid in TOGETHER.items()]
        return together + [self._trial(kind, WHOLE, rate, seed) for kind, rate in RATES.items()]

    def _trial(self, kind: str, grid: AdapterGrid, rate: float, seed: int) -> Trial:
        run = AdapterRun(grid=grid, layers=self.text.layers, rate=rate, seed=seed)
        spec = {"kind": kind, "run": asdict(run), "text": asdict(self.text), "evaluations": self.evaluations}
        return Trial(name=f"{kind}-seed{seed}", spec=spec)


PRESETS: dict[Preset, AdapterMergePlan] = {
    "quick": AdapterMergePlan(text=TextPlan(training=16, tuning=3, held_out=5), seeds=1, evaluations=2 * POPULATION),
    "full": AdapterMergePlan(text=ADAPTERS.text, seeds=3, evaluations=16 * POPULATION),
}
FULL = PRESETS["full"]
CHOSEN_ON = len(WEAK) * FULL.text.tuning * FULL.text.window_tokens
FIGURES = len(WEAK) * FULL.text.held_out * FULL.text.window_tokens

METHOD = f"""
The participants are the three adapters of [adapters](adapters.md) that were trained apart: around the FFNs of the
uppermost {FULL.text.layers} layers of a frozen SmolLM2-135M-Instruct, rank {WHOLE.rank}, each on the text of one domain
where the seed is weak (formal mathematics, German, French), from the same start, which adds nothing. They learn at
{RATES["further"]:g}, the best there for an adapter on its own domain and for the average, or at
{RATES["less-far"]:g}, the best for Arrow. What each learnt is the product A B of each layer.

The merges are those of [merging](merging.md), by the same code, made of these products: the average; the average
weighted by exp(-loss / temperature); task arithmetic (arXiv 2212.04089); TIES (arXiv 2306.01708); a share for each
adapter in each layer by an evolutionary search (after arXiv 2403.13187), {FULL.evaluations} evaluations; and the null,
the best of as many random shares. Both searches begin with the average. A merge of products is an adapter of up to the
rank of all, TIES of any; its cost beside that of the frozen layers, a tenth at most, is left out of the table.

Routing between the same adapters: Arrow (arXiv 2405.11157), which nobody trained, by token; their predictions averaged,
evenly or by the likelihood that each has given to the window so far; the one that was likeliest on the window's first
tokens; the one that belongs to the text's domain, told by its label; and, as the bound of choosing one for a window,
whichever was best in hindsight. Beside them what was trained on all the domains: one adapter, and {SMALL.per_token} of
{SMALL.experts} behind a gate that is trained with them, {FULL.text.training} windows of each domain, as all
participants together.

Everything that is chosen is chosen on {CHOSEN_ON:,} tokens of documents that are neither trained on nor
held out; every figure is of {FIGURES:,} held-out tokens, a third of each domain. Both are the same for all
{FULL.seeds} seeds; a difference is taken seed by seed. Intervals are of 95 %. FLOPs are two for each weight.

What this cannot show: what more adapters, trained for longer, would give. Three that know three languages are far from
each other; merging is said to work best among near ones. That the domains have equally much text in the mix favours the
plain average.
"""


def carry_out(spec: dict[str, Any], context: TrialContext) -> Result:
    """Train and measure; minutes, so nothing of it is kept but what the frozen layers gave for the texts."""
    texts = open_texts(SMOLLM2, read_domain, TextPlan(**spec["text"]), context.shared, context.progress)
    return run_trial(spec, texts, context)


def results_of(_plan: AdapterMergePlan, by_kind: Mapping[str, Sequence[Result]]) -> MergingResults:
    """Return the results as the page takes them."""
    apart = {kind: by_kind[kind] for kind in RATES}
    parameters = apart["further"][0]["parameters"]
    return MergingResults(
        words=WORDS,
        together={row: by_kind[kind] for kind, row in ROWS.items()},
        apart=apart,
        cost=Cost(parameters=parameters, active_parameters=parameters, flops_per_token=2 * parameters),
    )


EXPERIMENT = MergingExperiment(
    name="merging-adapters",
    claim='"Merging is throwing things at the wall": the adapters that were trained apart.',
    method=METHOD,
    presets=PRESETS,
    carry_out=carry_out,
    results_of=results_of,
)


def run_trial(spec: dict[str, Any], texts: Texts, context: TrialContext) -> Result:
    """What `carry_out` does, with any texts."""
    run = AdapterRun(**{**spec["run"], "grid": AdapterGrid(**spec["run"]["grid"])})
    if spec["kind"] in TOGETHER:
        return together(run, texts, context)
    return apart(run, texts, spec["evaluations"], context)


def together(run: AdapterRun, texts: Texts, context: TrialContext) -> Result:
    """Adapters that learn from all the domains, and their gate with them."""
    training = [texts.training[name] for name in WEAK]
    adapters = train_adapters(run, texts.seed, training, context.progress)
    nats_NT = AroundSeed(texts).nats(adapters.trunk)
    return {"nats": float(nats_NT.mean()), "tokens": sum(map(n_tokens, training))}


def apart(run: AdapterRun, texts: Texts, evaluations: int, context: TrialContext) -> Result:
    """An adapter for each domain; every way to make one prediction of them."""
    alone = list(train_apart(run, texts.seed, texts.training, context.progress).values())
    participants = [weights_of(adapters) for adapters in alone]
    base = {name: torch.zeros_like(weight_DD) for name, weight_DD in participants[0].items()}
    measure = AroundSeed(texts)
    merge_evaluator = MergeEvaluator(measure, evaluations, context.progress)
    ways = {SEED_ALONE: unsearched(merge_evaluator.figure(base), 1)}
    ways |= merge_evaluator.merges(MergeSearch(base, participants, merge_evaluator.loss), run.seed)
    for way, per_token in ((ARROW_ONE, 1), (ARROW_ALL, len(alone))):
        nats_NT = measure.nats(arrow(texts.seed, alone, per_token))
        ways[way] = unsearched(float(nats_NT.mean()), 1)
    log_p_PNT = torch.stack([merge_evaluator.log_likelihood(participant) for participant in participants])
    _, length, cosine = ways_apart(base, participants)
    return {
        "ways": ways | chosen_between(log_p_PNT, measure.owner_N, "token", "domain"),
        "participants": (-log_p_PNT.mean((1, 2))).tolist(),
        "length": length,
        "cosine": cosine,
        "tokens_of_evaluation": measure.n_tokens,
        "parameters": parameters_of(texts.seed),
    }


def weights_of(adapters: Adapters) -> dict[str, torch.Tensor]:
    """What they do to their inputs, A B [D, D], named as a model's tensors are."""
    named = zip(adapters.manifest.pretrained.attach, products(adapters), strict=True)
    return {f"layers.{layer}": weight_DD for layer, weight_DD in named}


class AroundSeed:
    """Measures adapters around the seed where it is weak; a Measure of their products."""

    def __init__(self, texts: Texts) -> None:
        self._adapters = [Whole(torch.empty(0)) for _ in texts.seed.layers]
        self._trunk = texts.seed.trunk(self._adapters)
        self._chosen_on = [texts.tuning[name] for name in WEAK]
        self._figures = [texts.held_out[name] for name in WEAK]
        self.owner_N = torch.cat([torch.full((len(ids_WT),), i) for i, ids_WT in enumerate(self._figures)])
        self.n_tokens = sum(map(n_tokens, self._chosen_on))

    def chosen_on(self, weights: Weights) -> float:
        """Return the loss on the text to choose on; see `Measure`."""
        return float(self._nats(self._with(weights), self._chosen_on).mean())

    def log_likelihood(self, weights: Weights) -> torch.Tensor:
        """Return the log-likelihoods of windows, domain by domain in the order of WEAK; see `Measure`."""
        return -self.nats(self._with(weights))

    def nats(self, trunk: PretrainedTrunk) -> torch.Tensor:
        """[N, T] of any trunk on the text for the figures."""
        return self._nats(trunk, self._figures)

    def _with(self, weights: Weights) -> PretrainedTrunk:
        for adapter, weight_DD in zip(self._adapters, weights.values(), strict=True):
            adapter.weight_DD = weight_DD
        return self._trunk

    def _nats(self, trunk: PretrainedTrunk, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([nats_per_token(trunk, ids_WT) for ids_WT in parts])


def parameters_of(seed: Seed) -> int:
    """Weights that a token meets above the layers that are never adapted, the table of tokens that occur included."""
    upper, model = decoder_layers(seed.language_model)[seed.layers[0] :], seed.manifest.model
    matrices = sum(weight.numel() for weight in upper.parameters() if weight.dim() > 1)
    return model.vocab_size * model.d_model + matrices

"""Claim 4: tiny adapters for the community. A frozen seed model, and adapters for domains where it is weak.

Many small ones behind a gate that is trained with them, against one of equal active size, and against adapters that
were trained apart, one for each domain, and put together without training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.pretrained_source import SMOLLM2
from experiments.adapters.adapting import STEP_WINDOWS, AdapterGrid
from experiments.adapters.arms import AdapterArm, AdapterArms, AdapterResults, AdapterTrial
from experiments.adapters.domains import read_domain
from experiments.adapters.measuring import measure
from experiments.adapters.report import adapters_report
from experiments.adapters.seed import TextPlan, open_texts
from experiments.harness.experiment import no_results

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from experiments.adapters.domains import Domain, DomainName
    from experiments.harness.experiment import Preset, Report, Result, Trial, TrialContext

RANK = 16
"""That works for a token in every trained arm but those that hold several adapters of it at once."""

HOSTS = 2
SMALL = AdapterGrid(rank=2, experts=256, per_token=8)
MANY = AdapterGrid(rank=2, experts=1024, per_token=8)
WHOLE = AdapterGrid(rank=RANK)
ARMS = (
    AdapterArm(label="the seed alone", way="alone"),
    AdapterArm(label="one adapter for all", way="gated", grid=WHOLE),
    AdapterArm(label="8 of 256 adapters", way="gated", grid=SMALL),
    AdapterArm(label="8 of 1,024 adapters", way="gated", grid=MANY),
    AdapterArm(label=f"8 of 1,024 adapters, on {HOSTS} hosts", way="gated", grid=MANY, hosts=HOSTS),
    AdapterArm(label="trained apart, each domain its own", way="own", grid=WHOLE),
    AdapterArm(label="trained apart, Arrow chooses 1", way="arrow-1", grid=WHOLE),
    AdapterArm(label="trained apart, Arrow weighs all 3", way="arrow-all", grid=WHOLE),
    AdapterArm(label="trained apart, merged", way="merged", grid=WHOLE),
)
# The best rates of runs before this one lay between the ends.
RATES = (1e-2, 3e-2, 1e-1)
FULL = AdapterArms(
    arms=ARMS,
    text=TextPlan(training=72, tuning=8, held_out=20),
    seeds=3,
    rates=RATES,
    tuning_windows=24,
)
QUICK = AdapterArms(
    arms=tuple(arm for arm in ARMS if arm.grid != MANY), text=TextPlan(training=16, tuning=1, held_out=5), seeds=1
)
WINDOW, LAYERS = FULL.text.window_tokens, FULL.text.layers
TOKENS, TUNING_TOKENS = 3 * FULL.text.training * WINDOW, 3 * FULL.tuning_windows * WINDOW
HELD_OUT_TOKENS = FULL.text.held_out * WINDOW

METHOD = f"""
The seed is SmolLM2-135M-Instruct (30 layers, D=576, made for English), never trained here. Adapters are the product's
`lora` experts around the FFNs of its uppermost {LAYERS} layers: x A B, added to what the FFN gives, trained by the
product's own layer, gate and Adam for experts. Only the uppermost layers, because of the processor: what is below them
is the same in every arm, so it is run once for each text and kept. Adapters in all layers would learn more. For the
same reason the seed foretells only those of its 49,152 tokens that occur in the texts, in every arm and when it is
alone: losses are over these, and lower than over all.

Texts are of three domains where the seed is weak (Metamath's formal proofs, a German book on Debian's packages, French
Wikipedia), and English Wikipedia, which no adapter learns from, to see what is forgotten. Held-out text is documents of
its own. Every arm learns from the same {TOKENS:,} tokens, a third of each domain, each once, in windows of {WINDOW},
{STEP_WINDOWS} windows a step; Adam, warm-up over 5 % of the tokens, then a cosine to a tenth. Adapters that are trained
apart see their own domain's third, in a third of the steps.

- **one adapter for all**: rank {RANK} in each adapted layer, on the mix of the domains. The control.
- **8 of 256** and **8 of 1,024**: adapters of rank {SMALL.rank} ({SMALL.experts * LAYERS:,} and
  {MANY.experts * LAYERS:,} in all), the same size for a token, behind a gate that is trained with them; a bias balances
  the load, no token is dropped.
- **on {HOSTS} hosts**: the same 1,024 a layer, held by real nodes, `python run_node.py coordinator` and {HOSTS} times
  `python run_node.py host` on one machine, found through the DHT and called over gRPC, int8 on the wire; seed and gate
  are in the trainer. At the rate that is best in one process.
- **each domain its own**: adapters of rank {RANK}, one for each domain, and somebody who knows a text's domain.
- **Arrow** (arXiv 2405.11157): the same adapters, and a gate that nobody trained. An adapter's prototype is the
  direction of its input that it amplifies most; a token goes to the adapter whose prototype it points along most, or
  to all, weighed by softmax.
- **merged**: the mean of the same adapters, which is one of rank {3 * RANK}.

The learning rate is tuned for each arm with a seed of its own, out of {", ".join(f"{rate:g}" for rate in RATES)}, by
the loss on documents that are neither trained on nor held out; a gate's is its adapters'. Arms that learn from the mix
are tuned on {TUNING_TOKENS:,} tokens; those that are trained apart on {TOKENS:,}, so that each adapter takes as many
steps, and for each way of using them. Held-out text is the same for all arms and their {FULL.seeds} seeds,
{HELD_OUT_TOKENS:,} tokens of each domain. A difference is taken seed by seed and window by window. Intervals are of
95 % and say what a seed changes, not what other texts would.

What this cannot show: what larger seeds, adapters in every layer, or a thousand times the text would do. From so little
text a domain's facts are not learnt, only its ways: its words, its marks, its form. With three adapters Arrow has
little to choose from. Who learns from the mix might do better at a lower rate than a third of the tokens asks for.
"""


class AdaptersExperiment:
    """The experiment; `presets` can be others in a test."""

    name = "adapters"
    claim = (
        "Tiny adapters for the community: thousands of them around a frozen model, each small enough for anybody's "
        "machine, make it better where it is weak."
    )
    method = METHOD

    def __init__(self, presets: Mapping[Preset, AdapterArms]) -> None:
        self.presets = presets

    def plan(self, preset: Preset, results: Mapping[str, Result]) -> Sequence[Trial]:
        """The seed alone, which tells at once whether it is installed; then rates; then every arm with each seed."""
        return self.presets[preset].plan(results)

    def run(self, spec: dict[str, Any], context: TrialContext) -> Result:
        """One training and its tests, or the seed alone. Takes a few minutes at most, so nothing of it is kept."""
        return run_trial(AdapterTrial.from_json(spec), SMOLLM2, read_domain, context)

    def report(self, preset: Preset, results: Mapping[str, Result]) -> Report:
        """Report on the arms' long trials; raises ConfigError where one has none."""
        found = AdapterResults(self.presets[preset], results)
        if found.missing:
            raise no_results(self.name, preset, found.missing[0])
        return adapters_report(found)


def run_trial(trial: AdapterTrial, model: str, read: Callable[[DomainName], Domain], context: TrialContext) -> Result:
    """What `run` does, with any pretrained model, as `--model` calls it, and texts."""
    return measure(trial, open_texts(model, read, trial.text, context.shared, context.progress), context)


EXPERIMENT = AdaptersExperiment({"quick": QUICK, "full": FULL})

"""All that `inspect` finds in a model, from one reading of held-out text and others without some experts."""

# Shapes: N windows, T positions of a window, K experts per token, P = N T K pairs, E experts of a layer.

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np

from node.model.gate import LoadWindow
from node.model.pairs import NO_EXPERT
from node.trainer.inspection.ablation import Ablation, Rise, singles_to_take, without_groups, without_single
from node.trainer.inspection.experts import Surroundings, context_of, favourites, places, token_text
from node.trainer.inspection.information import middle, mutual_information_bits, shuffled_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from common.tokenizer import Tokenizer
    from node.data.topics import WindowTopics
    from node.model.gate import GateStats
    from node.trainer.inspection.experts import Favourite
    from node.trainer.inspection.reading import Reader, WindowReading

    Ints = NDArray[np.int64]

SHUFFLINGS: Final = 100
MAX_CELLS: Final = 1 << 24
"""Experts of a layer times topics; no information is told of more."""

MAX_EXPERTS_TOLD: Final = 16_384
"""Experts of all layers together of which the findings tell more than sums: the busiest of each."""

TOKENS_TOLD, TOPICS_TOLD, CONTEXTS_TOLD = 8, 3, 4


@dataclass(frozen=True, kw_only=True)
class Told:
    """A token or a topic that an expert is chosen for; see `Favourite`."""

    text: str
    pairs: int
    share: float
    times: float


@dataclass(frozen=True, kw_only=True)
class ExpertFindings:
    """An expert: its pairs, these over the mean of its layer, what it is chosen for, and what is lost without it."""

    expert: int
    pairs: int
    load: float
    tokens: tuple[Told, ...]
    topics: tuple[Told, ...]
    contexts: tuple[Surroundings, ...]
    without: Rise | None


@dataclass(frozen=True, kw_only=True)
class Information:
    """Mutual information of a layer's experts and the windows' topics, in bits.

    `by_chance` is the mean of what labels give that are shuffled between windows; 95 % of those shufflings lie between
    `low` and `high`.
    """

    bits: float
    by_chance: float
    low: float
    high: float

    @property
    def excess(self) -> float:
        """Bits over those by chance."""
        return self.bits - self.by_chance


@dataclass(frozen=True, kw_only=True)
class LayerFindings:
    """A layer: how its load is spread, by all of its experts, what they tell of topics, and its busiest experts."""

    layer: int
    stats: GateStats
    loads: tuple[int, ...]
    about_topics: Information | None
    experts: tuple[ExpertFindings, ...]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All of it. `topics` are the names of the text's topics; fewer than two say nothing of experts."""

    nats: float
    windows: int
    tokens: int
    topics: tuple[str, ...]
    layers: tuple[LayerFindings, ...]
    groups: tuple[Ablation, ...]


@dataclass(frozen=True, kw_only=True)
class InspectionConfig:
    """How many experts of each layer are taken away, by `seed`, which also shuffles topics."""

    ablate: int
    seed: int


def findings(
    reader: Reader,
    tokenizer: Tokenizer,
    topics: WindowTopics | None,
    live: Sequence[torch.Tensor],
    config: InspectionConfig,
) -> Findings:
    """Have the model read, and say what that tells; `live` (bool [E]) are the experts of each layer that answer."""
    reading, rng = reader.read(), np.random.default_rng(config.seed)
    topics = None if topics is None or len(topics.names) == 1 else topics
    layers = [LayerChoices(reading, layer, live_E, topics) for layer, live_E in enumerate(live)]
    loads = [layer.load_E for layer in layers]
    without = [
        {
            expert: without_single(reader, reading, layer, expert)
            for expert in singles_to_take(load_E, config.ablate, rng)
        }
        for layer, load_E in enumerate(loads)
    ]
    n_told = max(1, MAX_EXPERTS_TOLD // len(live))
    return Findings(
        nats=float(reading.nats_N.mean()),
        windows=len(reading.ids_NT),
        tokens=reading.n_tokens,
        topics=() if topics is None else topics.names,
        groups=tuple(without_groups(reader, reading, loads, config.seed)) if config.ablate else (),
        layers=tuple(
            LayerFindings(
                layer=layer.number,
                stats=layer.stats(),
                loads=tuple(layer.load_E.tolist()),
                about_topics=layer.information(rng),
                experts=layer.experts(tokenizer, alone, n_told),
            )
            for layer, alone in zip(layers, without, strict=True)
        ),
    )


class LayerChoices:
    """What was chosen in layer `number` of a reading, pair by pair, and which of its experts were `live_E`."""

    def __init__(self, reading: WindowReading, number: int, live_E: torch.Tensor, topics: WindowTopics | None) -> None:
        self.number, self._reading, self._live_E, self._topics = number, reading, live_E, topics
        chosen_P = reading.chosen[number].ravel()
        self._per_token = len(chosen_P) // reading.n_tokens
        self._place_P = np.flatnonzero(chosen_P != NO_EXPERT)
        self._expert_P = chosen_P[self._place_P].astype(np.int64)
        self.load_E = np.bincount(self._expert_P, minlength=len(live_E))

    def stats(self) -> GateStats:
        """The statistics of the layer's gate, of this reading alone."""
        window = LoadWindow(len(self._live_E))
        window.observe(self._reading.summaries[self.number], self._live_E)
        return window.stats()

    def information(self, rng: np.random.Generator) -> Information | None:
        """What experts tell of topics; None without topics, or with too many experts to count them."""
        if self._topics is None or len(self.load_E) * len(self._topics.names) > MAX_CELLS:
            return None
        # A choice that found no expert stands for one of its own: every window has as many pairs.
        chosen_NX = self._reading.chosen[self.number].astype(np.int64)
        chosen_NX[chosen_NX == NO_EXPERT] = len(self.load_E)
        topic_N = self._topics.of_window_N
        shuffled = list(islice(shuffled_bits(chosen_NX, topic_N, rng), SHUFFLINGS))
        low, high = middle(shuffled)
        return Information(
            bits=mutual_information_bits(chosen_NX.ravel(), topic_N.repeat(chosen_NX.shape[1])),
            by_chance=float(np.mean(shuffled)),
            low=low,
            high=high,
        )

    def experts(self, tokenizer: Tokenizer, without: Mapping[int, Rise], n_told: int) -> tuple[ExpertFindings, ...]:
        """The `n_told` busiest experts, and those of which it was measured what is lost without them."""
        by_load = [int(expert) for expert in (-self.load_E).argsort(kind="stable")]
        told = [expert for rank, expert in enumerate(by_load) if rank < n_told or expert in without]
        mean = self.load_E.sum() / max(1, int(self._live_E.sum()))
        tokens, topics = self._tokens(tokenizer, told), self._topics_of(told)
        contexts = places(self._expert_P, told, CONTEXTS_TOLD)
        return tuple(
            ExpertFindings(
                expert=expert,
                pairs=int(self.load_E[expert]),
                load=float(self.load_E[expert] / max(mean, 1e-12)),
                tokens=tokens[expert],
                topics=topics.get(expert, ()),
                contexts=tuple(self._context(tokenizer, place) for place in self._place_P[contexts[expert]]),
                without=without.get(expert),
            )
            for expert in told
        )

    def _tokens(self, tokenizer: Tokenizer, told: Sequence[int]) -> dict[int, tuple[Told, ...]]:
        token_P = self._reading.ids_NT[:, :-1].ravel()[self._place_P // self._per_token]
        found = favourites(self._expert_P, token_P, told, TOKENS_TOLD)
        return {expert: _told(own, lambda token: token_text(tokenizer, token)) for expert, own in found.items()}

    def _topics_of(self, told: Sequence[int]) -> dict[int, tuple[Told, ...]]:
        if self._topics is None:
            return {}
        names, n_positions = self._topics.names, self._reading.ids_NT.shape[1] - 1
        topic_P = self._topics.of_window_N[self._place_P // (self._per_token * n_positions)]
        found = favourites(self._expert_P, topic_P, told, TOPICS_TOLD)
        return {expert: _told(own, names.__getitem__) for expert, own in found.items()}

    def _context(self, tokenizer: Tokenizer, place: int) -> Surroundings:
        window, position = divmod(int(place) // self._per_token, self._reading.ids_NT.shape[1] - 1)
        return context_of(self._reading.ids_NT[window], position, tokenizer)


def _told(favourite: Sequence[Favourite], text_of: Callable[[int], str]) -> tuple[Told, ...]:
    return tuple(Told(text=text_of(own.label), pairs=own.pairs, share=own.share, times=own.times) for own in favourite)

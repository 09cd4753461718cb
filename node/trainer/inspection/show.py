"""What `inspect` prints, and what it writes for programs. Pure functions of what was found.

Texts of tokens, topics and contexts are whatever stood in the data: none of them reaches a terminal as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from common.text import escaped
from node.model.transformer import bits_per_byte

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import RenderableType

    from node.trainer.inspection.ablation import Rise
    from node.trainer.inspection.experts import Surroundings
    from node.trainer.inspection.findings import ExpertFindings, Findings, Information, LayerFindings, Told

FORMAT: Final = 1
TOKENS_SHOWN, CONTEXTS_SHOWN = 3, 3
TOPIC_TIMES_SHOWN: Final = 1.2
"""An expert's foremost topic is shown where it has it so many times as often as all experts together."""

MAX_CHARS: Final = 12
"""Of one token, or of one topic."""

SMALLEST_SHARE: Final = 0.01
CHARS_BEFORE, CHARS_AFTER = 12, 6
"""Shown of a context, in which the file has a little more."""


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What was looked at: a model by its run or its folder, how far it is trained, and the text that it read."""

    model: str
    age: str
    gate: str
    experts_per_layer: int
    experts_per_token: int
    text: str
    bytes_per_token: float


def render_findings(inspected: Inspected, found: Findings, top: int) -> RenderableType:
    """The `top` busiest experts of each layer, and what is lost without groups of experts."""
    parts: list[RenderableType] = [_head(inspected, found)]
    for layer in found.layers:
        parts += [Text(), *_layer(layer, found, inspected, top)]
    if found.groups:
        parts += [Text(), _groups(found, inspected)]
    return Group(*parts)


def findings_json(inspected: Inspected, found: Findings) -> str:
    """Everything: of each layer the busiest experts, at most MAX_EXPERTS_TOLD of all layers."""
    layers = [{name: value for name, value in asdict(layer).items() if name != "loads"} for layer in found.layers]
    everything = {
        "format": FORMAT,
        "inspected": asdict(inspected),
        "bits_per_byte": bits_per_byte(found.nats, inspected.bytes_per_token),
        **asdict(found),
        "layers": layers,
    }
    return json.dumps(everything, indent=1, allow_nan=False) + "\n"


def _head(inspected: Inspected, found: Findings) -> RenderableType:
    bits = bits_per_byte(found.nats, inspected.bytes_per_token)
    about = (
        f"{len(found.layers)} layers of {inspected.experts_per_layer:,} experts, {inspected.experts_per_token} per "
        f"token by {inspected.gate}"
    )
    read = (
        f"{found.tokens:,} held-out tokens of {escaped(inspected.text)} in {found.windows:,} windows: {bits:.4f} "
        f"bits per byte ({found.nats:.4f} nats per token)"
    )
    first = Text.assemble((escaped(inspected.model), "bold"), f" at {inspected.age}")
    return Group(first, Text(about, style="dim"), Text(read, style="dim"))


def _layer(layer: LayerFindings, found: Findings, inspected: Inspected, top: int) -> Iterator[RenderableType]:
    stats = layer.stats
    idle, away = sum(not load for load in layer.loads), len(layer.loads) - stats.n_live
    without_host = f" ({away:,} have no host)" if away else ""
    yield Text.assemble(
        (f"layer {layer.layer}", "bold"),
        f": {idle:,} of {len(layer.loads):,} experts never chosen{without_host}, the busiest "
        f"{stats.load_max_over_mean:.1f} times as often as the mean; a token's weights amount to "
        f"{stats.effective_k:.1f} experts",
    )
    if layer.about_topics is not None:
        yield Text(_information_words(layer.about_topics, len(found.topics)))
    yield _experts(layer.experts[:top], inspected.bytes_per_token, is_measured=bool(found.groups))


def _information_words(about: Information, n_topics: int) -> str:
    certain = "" if about.bits > about.high else ", no more than chance can do"
    return (
        f"its experts tell {max(0.0, about.excess):.4f} bits of which of {n_topics} topics a token is about{certain}: "
        f"{about.bits:.4f}, less the {about.by_chance:.4f} of shuffled topics (95 % of these lie between "
        f"{about.low:.4f} and {about.high:.4f})"
    )


def _experts(experts: Iterable[ExpertFindings], bytes_per_token: float, *, is_measured: bool) -> Table:
    table = _table(("expert", "right"), ("load", "right"), ("chosen for", "left"), ("in", "left"))
    if is_measured:
        table.add_column("without it", justify="right", no_wrap=True)
    for expert in experts:
        chosen_for = [_told_text(one, quote="'") for one in expert.tokens[:TOKENS_SHOWN]]
        chosen_for += [_told_text(one, quote="") for one in expert.topics[:1] if one.times >= TOPIC_TIMES_SHOWN]
        contexts = [_context_text(context) for context in expert.contexts[:CONTEXTS_SHOWN]]
        row = [Text(f"{expert.expert:,}"), Text(f"{expert.load:.1f}x"), _lines(chosen_for), _lines(contexts)]
        if is_measured:
            row.append(Text("" if expert.without is None else _rise_text(expert.without, bytes_per_token, "\n")))
        table.add_row(*row)
    return table


def _groups(found: Findings, inspected: Inspected) -> Table:
    table = _table(("taken away", "left"), ("experts a layer", "right"), ("bits per byte more", "right"))
    for group in found.groups:
        table.add_row(group.taken, f"{group.experts:,}", _rise_text(group.rise, inspected.bytes_per_token))
    return table


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True, overflow="ellipsis")
    return table


def _told_text(told: Told, quote: str) -> Text:
    share = f"{told.share:.0%}" if told.share >= SMALLEST_SHARE else f"<{SMALLEST_SHARE:.0%}"
    return Text(f"{quote}{_cut(told.text)}{quote} {share} {told.times:.2g}x")


def _context_text(context: Surroundings) -> Text:
    before, after = escaped(context.before)[-CHARS_BEFORE:], escaped(context.after)[:CHARS_AFTER]
    return Text.assemble(before, (f"«{_cut(context.token)}»", "bold"), after)


def _rise_text(rise: Rise, bytes_per_token: float, between: str = " ") -> str:
    more, half = (bits_per_byte(nats, bytes_per_token) for nats in (rise.nats, rise.half_width))
    return f"{more:+.5f}{between}±{half:.5f}" if more or half else "0"


def _lines(lines: Iterable[Text]) -> Text:
    return Text("\n").join(lines)


def _cut(text: str) -> str:
    shown = escaped(text)
    return shown if len(shown) <= MAX_CHARS else f"{shown[: MAX_CHARS - 1]}…"

"""Texts of four domains, so alike that a pretrained model of random weights can learn them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.adapters.domains import Domain, parted

if TYPE_CHECKING:
    from experiments.adapters.domains import DomainName

WORDS: dict[DomainName, str] = {
    "mathematics": "|- ( ph -> ps ) $= ",
    "german": "und der Dachs ",
    "french": "est une abeille ",
    "english": "of the river ",
}


def tiny_domain(name: DomainName) -> Domain:
    """Two hundred documents of a line each, all alike but for a number."""
    training, held_out = parted([f"{n} {WORDS[name] * 3}" for n in range(200)])
    return Domain(name=name, training=training, held_out=held_out)

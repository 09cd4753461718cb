"""The seed of the adapters' experiment: of its texts' tokens alone, its frozen layers run once. And the real one."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

from common.errors import ConfigError
from common.pretrained_source import SMOLLM2, find_pretrained, shape_of
from common.tokenizer import FileTokenizer
from experiments.adapters.adapting import nats_per_token
from experiments.adapters.apart import seed_alone
from experiments.adapters.domains import DOMAINS, windows
from experiments.adapters.seed import TEXT_SEED, TextPlan, open_texts
from node.model.frozen_states import SplitModel
from node.model.pretrained_files import loaded
from tests.support.tiny_domain import tiny_domain
from tests.support.tiny_pretrained import N_TOKENS, save_pretrained
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.adapters.domains import Domain, DomainName

TEXT = TextPlan(training=12, tuning=2, held_out=3, window_tokens=16, layers=2)
TOWER = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
)


def ignore(done: float, total: float, words: str) -> None:
    assert done <= total
    assert words


def ids_of(tokenizer: FileTokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode([text.encode()])[0].tolist()
    return ids


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_seed_foretells_what_the_whole_model_does_of_the_tokens_that_occur(tmp_path: Path, tied: bool) -> None:
    folder = save_pretrained(tmp_path / "model", tie_word_embeddings=tied)
    texts = open_texts(str(folder), tiny_domain, TEXT, tmp_path, ignore)
    tokenizer = FileTokenizer(tiny_tokenizer(N_TOKENS), "tiny")
    documents = tiny_domain("german").held_out
    ids_WT = windows(documents, TEXT.held_out, TEXT.window_tokens + 1, lambda text: ids_of(tokenizer, text), TEXT_SEED)
    found_WT = texts.held_out["german"]
    vocabulary = dict(zip(found_WT.flatten().tolist(), ids_WT.flatten().tolist(), strict=True))
    n_tokens = texts.seed.manifest.model.vocab_size
    assert len(set(vocabulary.values())) == len(vocabulary) < n_tokens < N_TOKENS

    trunk = seed_alone(texts.seed)
    whole = loaded(folder, ["model.safetensors"], torch.float32)
    logits_WTV = whole(ids_WT[:, :-1]).logits[..., list(vocabulary.values())]
    torch.testing.assert_close(trunk(found_WT[:, :-1])[..., list(vocabulary)], logits_WTV, rtol=1e-4, atol=1e-4)


def test_the_frozen_layers_run_once_for_all_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shared, runs = str(save_pretrained(tmp_path / "model")), tmp_path / "shared", list[int]()
    shared.mkdir()
    states = SplitModel.states

    def counted(split: SplitModel, ids_BT: torch.Tensor) -> torch.Tensor:
        runs.append(len(ids_BT))
        return states(split, ids_BT)

    monkeypatch.setattr(SplitModel, "states", counted)
    first = open_texts(folder, tiny_domain, TEXT, shared, ignore)
    assert sum(runs) == 3 * (TEXT.training + TEXT.tuning) + len(DOMAINS) * TEXT.held_out
    runs.clear()
    later = open_texts(folder, tiny_domain, TEXT, shared, ignore)
    assert not runs
    trunks = [seed_alone(texts.seed) for texts in (first, later)]
    runs.clear()  # a trunk tries whether its model can be split
    nats = [nats_per_token(trunk, first.training["french"]) for trunk in trunks]
    assert not runs
    assert torch.equal(*nats)
    assert len([path for path in shared.iterdir() if path.is_dir()]) == 1, "nothing unfinished is left"


def test_what_was_kept_of_other_texts_is_not_taken(tmp_path: Path) -> None:
    folder = str(save_pretrained(tmp_path / "model"))

    def other(name: DomainName) -> Domain:
        domain = tiny_domain(name)
        return replace(domain, held_out=tuple(text.upper() for text in domain.held_out))

    texts, others = (open_texts(folder, read, TEXT, tmp_path, ignore) for read in (tiny_domain, other))
    assert texts.seed.manifest.model.vocab_size != others.seed.manifest.model.vocab_size


@pytest.mark.slow
@torch.no_grad()
def test_the_real_seed_goes_on_as_anybody_would_and_shuffled_words_surprise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        source = find_pretrained(SMOLLM2)
    except ConfigError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # the library's bar would leave a thread behind
    model, tokenizer = loaded(source.folder, list(source.names), torch.float32), shape_of(source).tokenizer
    cut = FileTokenizer(tokenizer, SMOLLM2)
    for prompt, word in (("The capital of France is", " Paris"), ("Water freezes at 0 degrees", " Celsius")):
        logits_V = model(torch.tensor([ids_of(cut, prompt)])).logits[0, -1]
        assert cut.decode([int(logits_V.argmax())]).decode() == word
    words = TOWER.split()
    random.Random(0).shuffle(words)
    nats = []
    for text in (TOWER, " ".join(words)):
        ids_T = torch.tensor(ids_of(cut, text))
        nats.append(float(functional.cross_entropy(model(ids_T[None, :-1]).logits[0], ids_T[1:])))
    assert 1.0 < nats[0] < 2.5
    assert nats[1] > 4.5

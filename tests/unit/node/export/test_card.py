"""The card says what is known of a model, and what is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from node.export.card import KnownTraining, card_text, training_of
from node.export.unfinished import Taken
from protocol.manifest import TRUNK, BlockId, Manifest, ModelConfig, all_blocks
from protocol.run_assets import PretrainedConfig, PretrainedFile
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = small_manifest()
TAKEN = {
    block_id: Taken(version=10, word="two replicas", run_tokens=5000 if block_id == TRUNK else 0)
    for block_id in (TRUNK, *all_blocks(MANIFEST.model))
}
STILL = dict.fromkeys(TAKEN, 10)


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_it_names_the_run_and_what_was_trained() -> None:
    card = card_text(MANIFEST, TAKEN, STILL, KnownTraining())
    assert card.startswith("---\nlibrary_name: transformers\n")
    for words in (
        MANIFEST.run_id,
        "| trained on | 5,000 tokens |",
        "| experts | 32 (16 in each layer",
        "at version 10",
    ):
        assert words in card
    assert "| held-out loss | not known |" in card
    assert "not known to who exported it, nor is its licence" in card


AROUND = Manifest(
    name="tiny-llama",
    model=ModelConfig(trunk="hf", d_model=16, n_heads=1, experts_per_layer=16, experts_per_block=4, expert_kind="lora"),
    pretrained=PretrainedConfig(
        files=(PretrainedFile(name="tiny.gguf", sha256="ab" * 32, n_bytes=47_904),), dtype="bf16", attach=(1, 3)
    ),
)


def test_it_tells_a_pretrained_model_from_what_was_trained_beside_it() -> None:
    taken = {id_: TAKEN[TRUNK] if id_ == TRUNK else TAKEN[BlockId(0, 0)] for id_ in (TRUNK, *all_blocks(AROUND.model))}
    card = one_line(card_text(AROUND, taken, {}, KnownTraining()))
    for words in (
        "The run is called `tiny-llama`",
        f"| `tiny.gguf` | 47,904 | `{'ab' * 32}` |",
        "its licence applies here. The run does not know which licence that is",
        "beside the feed-forward parts of its layers 1, 3, counted from 0, and the gates that choose among them. ",
        "All else of it is as it was, in bfloat16.",
        "`trust_remote_code` runs `modeling_kilohive_pretrained.py`, `kilohive_experts.py`, `kilohive_gates.py`",
        "| layers with experts | 2, of width 16 |",
        "| context in training | 128 tokens |",
    ):
        assert words in card
    unfrozen = replace(AROUND, pretrained=replace(AROUND.pretrained, dtype="fp32", unfreeze=("model.norm", "lm_head")))
    card = one_line(card_text(unfrozen, taken, {}, KnownTraining()))
    assert "and of its own parameters those whose names begin with `model.norm`, `lm_head`. All else" in card


def test_a_run_that_stands_still_is_of_one_moment() -> None:
    assert "the run stood still" in card_text(MANIFEST, TAKEN, dict.fromkeys(TAKEN, 9), KnownTraining())


def test_it_says_which_parts_the_run_went_on_from_and_by_how_much() -> None:
    newest = {**STILL, BlockId(1, 2): 1250, BlockId(0, 1): 13, TRUNK: 11}
    card = one_line(card_text(MANIFEST, TAKEN, newest, KnownTraining()))
    assert (
        "3 of 9 parts had live replicas that were further, in optimizer steps: 1/2 by 1,240, 0/1 by 3, trunk by 1."
        in card
    )


def test_of_many_parts_the_first_are_named() -> None:
    manifest = small_manifest(model={"experts_per_block": 1})
    blocks = all_blocks(manifest.model)
    taken = {TRUNK: TAKEN[TRUNK], **{block_id: Taken(version=1, word="two replicas") for block_id in blocks}}
    card = card_text(manifest, taken, dict.fromkeys(taken, 11), KnownTraining())
    assert " and 23 more by less" in card


def test_it_says_what_nobody_confirms() -> None:
    alone = {block_id: replace(of, word="one replica") for block_id, of in TAKEN.items()}
    card = one_line(card_text(MANIFEST, alone, STILL, KnownTraining()))
    assert "8 of 8 blocks were taken on the word of the only replica that could be had: nobody confirms them." in card
    assert "The trunk was taken from the only replica that could be had, on its word" in card
    half = {**TAKEN, BlockId(0, 0): alone[BlockId(0, 0)]}
    card = one_line(card_text(MANIFEST, half, STILL, KnownTraining()))
    assert "Of 8 blocks of experts 7 were taken from a replica that a second confirmed. 1 of 8 blocks" in card


@pytest.mark.parametrize(
    ("summary", "wanted"),
    [
        (
            {"run_id": MANIFEST.run_id, "attribution": "A book,\nCC0", "bits_per_byte_end": 1.5, "steps": 40},
            KnownTraining(data="A book, CC0", held_out_bits=1.5, steps=40),
        ),
        ({"run_id": "another", "attribution": "x", "bits_per_byte_end": 1.5, "steps": 40}, KnownTraining()),
        ({"run_id": MANIFEST.run_id}, KnownTraining()),
        ([], KnownTraining()),
    ],
)
def test_a_trainers_summary_is_believed_for_its_own_run(tmp_path: Path, summary: object, wanted: KnownTraining) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = training_of(tmp_path, MANIFEST.run_id)
    assert found == wanted
    card = card_text(MANIFEST, TAKEN, STILL, found)
    assert ("1.5000 bits per byte at step 40" in card) == (wanted != KnownTraining())


def test_without_a_summary_nothing_is_known(tmp_path: Path) -> None:
    assert training_of(None, MANIFEST.run_id) == training_of(tmp_path, MANIFEST.run_id) == KnownTraining()

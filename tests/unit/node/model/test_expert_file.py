"""An expert as a file: its bytes are checked by field before a tensor is made of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from common.errors import InvalidInputError, KilohiveError, LimitExceededError
from node.model import expert_file as files
from node.model.expert_file import MAX_HEADER_BYTES, ExpertId, max_file_bytes, metadata_of, read_expert
from protocol.manifest import BlockId
from tests.support.offers import SHAPES, weights
from tests.support.swarm_parts import small_manifest

MANIFEST = small_manifest(dtype="fp64", codec="fp64")


def test_a_file_holds_the_weights_to_the_bit_and_what_it_says_of_itself() -> None:
    given = weights()
    data = files.expert_file(given, {"layer": "1", "version": "17"})
    read = read_expert(data, MANIFEST)
    assert read.keys() == given.keys()
    assert all(torch.equal(read[name], given[name]) for name in given)
    assert metadata_of(data) == {"layer": "1", "version": "17"}
    assert metadata_of(save(given)) == {}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"w_in": torch.zeros(8, 16, dtype=torch.float64)}, r"file\.w_in: is not F64 of shape \[16, 8\]"),
        ({"w_in": torch.zeros(16, 8)}, r"file\.w_in: is not F64"),
        ({"w_out": torch.full((8, 16), math.nan, dtype=torch.float64)}, r"file\.w_out: holds a number"),
        ({"w_out": torch.full((8, 16), math.inf, dtype=torch.float64)}, r"file\.w_out: holds a number"),
        ({"extra": torch.zeros(1)}, "file: holds other tensors than w_in, w_out"),
    ],
    ids=["shape", "type", "nan", "infinity", "name"],
)
def test_a_file_that_is_no_expert_of_the_run_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError, match=field):
        read_expert(save(weights(**changes)), MANIFEST)


def test_an_expert_without_one_of_its_tensors_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="other tensors than w_in, w_out"):
        read_expert(save({"w_in": weights()["w_in"]}), MANIFEST)


@pytest.mark.parametrize(("layer", "expert"), [(-1, 0), (2, 0), (0, -1), (0, 16)])
def test_a_place_outside_of_the_grid_is_refused(layer: int, expert: int) -> None:
    with pytest.raises(InvalidInputError, match="2 layers of 16 experts"):
        ExpertId(layer, expert).check(MANIFEST.model)


def test_a_place_is_a_row_of_a_block() -> None:
    place = ExpertId(1, 14)
    place.check(MANIFEST.model)
    assert (place.block(MANIFEST.model), place.row(MANIFEST.model)) == (BlockId(1, 3), 2)


def test_a_header_that_claims_terabytes_is_refused_before_anything_is_allocated() -> None:
    claimed = {name: {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 1 << 43]} for name in SHAPES}
    header = json.dumps(claimed).encode()
    with pytest.raises(InvalidInputError, match=r"file\.w_in"):
        read_expert(len(header).to_bytes(8, "little") + header, MANIFEST)
    with pytest.raises(LimitExceededError, match=rf"file\.header bytes: .* {MAX_HEADER_BYTES}"):
        read_expert((1 << 60).to_bytes(8, "little"), MANIFEST)


def doubled(first: bool) -> bytes:
    """A file whose header names w_in twice, once with another shape: there first or last."""
    data = save(weights())
    n = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + n].decode().strip()
    other = '"w_in":{"dtype":"F64","shape":[8,16],"data_offsets":[0,1024]}'
    changed = f"{{{other},{header[1:]}" if first else f"{header[:-1]},{other}}}"
    return len(changed).to_bytes(8, "little") + changed.encode() + data[8 + n :]


def test_a_tensor_that_is_named_twice_is_checked_as_it_is_read() -> None:
    assert read_expert(doubled(first=True), MANIFEST)["w_in"].shape == (16, 8)
    with pytest.raises(InvalidInputError, match=r"file\.w_in"):
        read_expert(doubled(first=False), MANIFEST)


def test_a_right_header_over_too_few_bytes_or_too_many_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no safetensors file"):
        read_expert(save(weights())[:-8], MANIFEST)
    with pytest.raises(InvalidInputError, match="no safetensors file"):
        read_expert(save(weights()) + b"more", MANIFEST)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_typed_error(data: bytes) -> None:
    with pytest.raises(KilohiveError):
        read_expert(data, MANIFEST)
    try:
        metadata_of(data)
    except KilohiveError:
        return


def test_the_longest_file_holds_the_tensors_and_a_header_and_a_longer_one_is_refused_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(save(weights())) <= max_file_bytes(MANIFEST) == 8 + MAX_HEADER_BYTES + 8 * 2 * 16 * 8
    with pytest.raises(LimitExceededError, match="file bytes: is 9999, but the limit is"):
        read_expert(bytes(9999), MANIFEST)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 100)
    assert max_file_bytes(MANIFEST) == 100

"""The text that a trainer reads, as bytes. node's trainer and evaluation, and experiments, may import this.

Path of a step: **data** -> transformer -> gate -> dispatch. `sources` finds documents: `formats` says what a file is,
`compressed` unpacks it, `json_rows` and `tables` read what is in rows, and `bad_rows` counts those that cannot be read.
`cache` lays documents down once as two memory-mapped files (training and held-out), which `eviction` keeps within a
bound. `shuffle` orders windows, `dataset` hands out batches. `topics` says what held-out windows are about.
"""

from __future__ import annotations

from node.data.dataset import TextDataset, open_dataset
from node.data.sources import WIKIPEDIA_ATTRIBUTION

__all__ = ["WIKIPEDIA_ATTRIBUTION", "TextDataset", "open_dataset"]
